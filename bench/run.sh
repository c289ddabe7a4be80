#!/usr/bin/env bash
# Measures the binaries that the images are made of. Arguments go to the measurement; without any, all are made in their short form.
#
#   bench/run.sh [capture|latency|pacing|throughput|scale] [OPTION...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests/setup.sh base rust kafka cluster
eval "$(tests/setup.sh env)"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}
deploy/build-binaries.sh

# The operator, with an API server of its own that has nothing behind it.
scale() {
  local memory=/dev/shm folder
  cargo build -q --locked --release -p meander-bench-scale
  [ -d "$memory" ] || memory=${TMPDIR:-/tmp}
  folder=$(mktemp -d "$memory/meander-bench.XXXXXX")
  # shellcheck disable=SC2064
  trap "tests/cluster/apiserver.sh down '$folder'" EXIT
  tests/cluster/apiserver.sh up "$folder"
  "$CARGO_TARGET_DIR/release/meander-bench-scale" --api-server "$folder" --operator dist/meander-operator "$@"
}
if [ "${1:-}" = scale ]; then
  scale "${@:2}"
  exit
fi
# The receiver and the consumer that a replay is compared with are in it.
cargo build -q --locked --release -p meander-bench
bench() { env MEANDER_DIST="$PWD/dist" "CARGO_BIN_EXE_meander-runtime=$PWD/dist/meander-runtime" "$CARGO_TARGET_DIR/release/meander-bench" "$@"; }
if [ $# -gt 0 ]; then
  bench "$@"
else
  bench capture --rounds 2
  bench latency --seconds 20 --rounds 1
  bench pacing
  bench throughput --rounds 1
  scale --pipelines 100 --replays 100 --window 30
fi
