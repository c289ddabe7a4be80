#!/usr/bin/env bash
# Runs every check and every test, and closes with how many passed and failed.
#
#   tests/run.sh              everything
#   tests/run.sh lint         formatting, clippy, dependency rules, charts
#   tests/run.sh unit         the Rust and Go tests, with real services and a real API server
#   tests/run.sh e2e          on a cluster of its own
#   tests/run.sh faults       eight faults under load, the same each time
#   tests/run.sh long         what takes too long for every change
#   tests/run.sh chaos        faults under load: forty, or MEANDER_CHAOS_FAULTS; and twenty on a cluster, or MEANDER_CHAOS_CLUSTER_FAULTS
#   tests/run.sh fuzz         wrong input for everything that reads it, for ten minutes or MEANDER_FUZZ_SECONDS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MEANDER_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/meander}"
export MEANDER_CACHE CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}
passed=0 failed=0
# shellcheck disable=SC2016 # an awk program
RUST_RESULTS='/^test result:/ { p += $4; f += $6 }'
PROMISES='/^ok - / { p++ } /^not ok - / { f++ }'
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# check TITLE COMMAND...: one check, by its exit status.
check() {
  local title=$1 start=$SECONDS; shift
  printf '\n== %s\n' "$title"
  if "$@"; then
    passed=$((passed + 1))
    printf 'ok - %s (%d s)\n' "$title" $((SECONDS - start))
  else
    failed=$((failed + 1))
    printf 'not ok - %s (%d s)\n' "$title" $((SECONDS - start))
  fi
}

# counted TITLE PATTERN COMMAND...: a runner of many tests. Lines that match PATTERN, an awk program that adds to p and f, are
# counted; a runner that fails without having said so counts as one failure.
counted() {
  local title=$1 pattern=$2 start=$SECONDS status=0 p=0 f=0; shift 2
  printf '\n== %s\n' "$title"
  "$@" 2>&1 | tee "$log" || status=$?
  read -r p f < <(awk "$pattern"' END { print p + 0, f + 0 }' "$log")
  [ "$status" = 0 ] || [ "$f" -gt 0 ] || f=1
  [ "$status" != 0 ] || [ "$p" -gt 0 ] || { echo "no test ran"; f=1; }
  passed=$((passed + p)) failed=$((failed + f))
  printf '%s: %d passed, %d failed (%d s)\n' "$title" "$p" "$f" $((SECONDS - start))
}

lint() {
  check "Rust is formatted" cargo fmt --all --check
  check "Go is formatted" test -z "$(gofmt -l tests/verifier tests/cluster)"
  check "clippy" cargo clippy -q --locked --workspace --all-targets -- -D warnings
  check "go vet" env -C tests/verifier go vet ./...
  check "licences, bans and sources of the dependencies" cargo deny --log-level error check licenses bans sources
  check "helm lint" helm lint --strict charts/meander
  check "shell scripts" shellcheck tests/*.sh tests/cluster/*.sh tests/e2e/*.sh deploy/*.sh deploy/*/*.sh bench/*.sh
}

# Twice as many tests at a time as there are processors, whatever test program they are in: most of their time they wait for something, and a program that
# has a single long test, as many have, would leave the others idle. The programs with the most source come first, so that no long one is left at the end.
rust_tests() {
  # shellcheck disable=SC2016 # expanded by the other shell
  cargo test -q --locked --workspace --no-run --message-format json-render-diagnostics |
    jq -r 'select(.profile.test and .executable) | [.target.src_path, .manifest_path, .executable] | join(" ")' |
    while read -r source manifest program; do
      echo "$(wc -c <"$source") ${manifest%/*} $program"
    done | sort -rn | cut -d ' ' -f 2- |
    RUST_TEST_THREADS=1 RUST_BACKTRACE=0 log=$log xargs -r -P $((2 * $(nproc))) -L 1 bash -c '
      start=$SECONDS status=0
      output=$(env -C "$0" "$1" 2>&1) || status=$?
      flock "$log" echo "$1 ($((SECONDS - start)) s)
$output"
      exit "$status"'
}

unit() {
  # The order matters: the tests start the runtime that lies beside them.
  check "build" cargo build -q --locked --workspace
  counted "Rust tests" "$RUST_RESULTS" rust_tests
  check "examples in the documentation" cargo test -q --locked --workspace --doc
  # shellcheck disable=SC2016 # an awk program
  counted "Go tests" '/^ *--- PASS/ { p++ } /^ *--- FAIL/ { f++ }' env -C tests/verifier go test -v ./...
}

# As users run it: optimised.
long() {
  check "build" cargo build -q --release --locked -p meander-runtime
  counted "long tests" "$RUST_RESULTS" env MEANDER_LARGE_ROWS=10000000 \
    cargo test --release --locked -p meander-runtime --test large -- --nocapture
  counted "fifty kills" "$RUST_RESULTS" \
    cargo test --release --locked -p meander-runtime --test kills -- --ignored --nocapture
  counted "the model, explored further" "$RUST_RESULTS" \
    cargo test --release --locked -p meander-model --test explored -- --ignored --nocapture
  chaos
}

faults() {
  check "eight faults under load" env MEANDER_CHAOS_SEED=1 MEANDER_CHAOS_FAULTS=8 MEANDER_CHAOS_LONGEST=8 tests/chaos.sh
}

chaos() {
  check "faults under load" tests/chaos.sh
  counted "faults on a cluster under load" "$PROMISES" tests/e2e/chaos.sh
}

fuzz() {
  local seconds=${MEANDER_FUZZ_SECONDS:-600}
  counted "fuzzing" "$RUST_RESULTS" env MEANDER_FUZZ_SECONDS=$((seconds / 2)) \
    cargo test --locked -p meander-runtime --test fuzz --test fuzz_inputs -- --nocapture
}

e2e() {
  counted "end to end" "$PROMISES" tests/e2e/run.sh
}

tests/setup.sh
eval "$(tests/setup.sh env)"
[ $# -gt 0 ] || set -- lint unit e2e faults
for part; do "$part"; done
printf '\n%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
