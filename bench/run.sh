#!/usr/bin/env bash
# Measures the binaries that the images are made of. Arguments go to the measurement; without any, all are made in their short form.
#
#   bench/run.sh [capture|pacing|throughput] [OPTION...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests/setup.sh base rust kafka
eval "$(tests/setup.sh env)"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}
deploy/build-binaries.sh
# The receiver and the consumer that a replay is compared with are in it.
cargo build -q --locked --release -p meander-bench
bench() { env MEANDER_DIST="$PWD/dist" "CARGO_BIN_EXE_meander-runtime=$PWD/dist/meander-runtime" "$CARGO_TARGET_DIR/release/meander-bench" "$@"; }
if [ $# -gt 0 ]; then
  bench "$@"
else
  bench capture --rounds 2
  bench pacing
  bench throughput --rounds 1
fi
