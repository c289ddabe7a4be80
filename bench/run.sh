#!/usr/bin/env bash
# Measures the binaries that the images are made of, beside what a user would pick instead and beside what bounds everybody.
#
#   bench/run.sh                      every work, in five rounds, and a summary: hours
#   bench/run.sh ours [OPTION...]     the same without the peers
#   bench/run.sh WORK [OPTION...]     one work; catch-up, snapshot, latency, idle and start know --rounds N and --peers none
#   bench/run.sh summary [--plots FOLDER]
#   bench/run.sh scale [OPTION...]    the operator, by itself
#   bench/run.sh micro [OPTION...]    one change at each step of its way, without a service; the options are Criterion's
#
# WORK is catch-up, snapshot, latency, idle, start, limits, pacing or throughput. Each round of each contestant is a line in dist/bench.jsonl, or in
# the file that --results names, behind what is there; the summary is of all of them. With MEANDER_RUNTIME set, that program is
# measured in place of the static one, and MEANDER_BUILD says what it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
needs=(base rust kafka peers)
[ "${1:-}" != micro ] || needs=(base rust)
tests/setup.sh "${needs[@]}"
eval "$(tests/setup.sh env)"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}

if [ "${1:-}" = micro ]; then
  exec cargo bench -q --locked -p meander-runtime --bench hot_paths -- "${@:2}"
fi

if [ -z "${MEANDER_RUNTIME:-}" ]; then
  deploy/build-binaries.sh
  MEANDER_RUNTIME=$PWD/dist/meander-runtime
  MEANDER_BUILD=$(git describe --always --dirty)
fi
# The observers, the load, and the consumer that a replay is compared with are in it.
cargo build -q --locked --release -p meander-bench
bench() {
  env MEANDER_DIST="$PWD/dist" MEANDER_BUILD="${MEANDER_BUILD:-unknown}" "CARGO_BIN_EXE_meander-runtime=$MEANDER_RUNTIME" \
    "$CARGO_TARGET_DIR/release/meander-bench" "$@"
}

# The operator, with an API server of its own that has nothing behind it.
scale() {
  local memory=/dev/shm folder
  tests/setup.sh cluster
  cargo build -q --locked --release -p meander-bench-scale
  [ -d "$memory" ] || memory=${TMPDIR:-/tmp}
  folder=$(mktemp -d "$memory/meander-bench.XXXXXX")
  # shellcheck disable=SC2064
  trap "tests/cluster/apiserver.sh down '$folder'" EXIT
  tests/cluster/apiserver.sh up "$folder"
  "$CARGO_TARGET_DIR/release/meander-bench-scale" --api-server "$folder" --operator dist/meander-operator "$@"
}

# works LATENCY-PEERS OPTION...: every work with the same options.
works() {
  local latency=$1 load rate; shift
  for load in inserts mixed wide large; do bench catch-up --load "$load" "$@"; done
  bench snapshot "$@"
  for rate in 1000 10000; do bench latency --rate "$rate" --clients $((rate / 125)) "$@" --peers "$latency"; done
  bench idle "$@"
  bench start "$@"
}

case ${1:-} in
  '')
    works default,tuned,low-latency
    bench snapshot --rows 20000000 --rounds 1
    bench limits
    bench pacing
    bench throughput
    bench summary
    scale --pipelines 100 --replays 100 --window 30
    ;;
  ours)
    works none --peers none "${@:2}"
    bench pacing
    bench throughput
    bench summary
    ;;
  scale) scale "${@:2}" ;;
  *) bench "$@" ;;
esac
