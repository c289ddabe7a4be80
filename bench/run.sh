#!/usr/bin/env bash
# Builds what is measured, optimised, and measures it. Arguments go to the measurement; without any, all are made in their short form.
#
#   bench/run.sh [capture|pacing] [OPTION...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests/setup.sh base kafka
eval "$(tests/setup.sh env)"
: "${CARGO_TARGET_DIR:=$MEANDER_CACHE/target}"
export CARGO_TARGET_DIR
cargo build -q --release --locked -p meander-runtime -p meander-workload -p meander-bench
bench() { env "CARGO_BIN_EXE_meander-runtime=$CARGO_TARGET_DIR/release/meander-runtime" "$CARGO_TARGET_DIR/release/meander-bench" "$@"; }
if [ $# -gt 0 ]; then
  bench "$@"
else
  bench capture --rounds 2
  bench pacing
fi
