#!/usr/bin/env bash
# Breaks one thing after the other under load, with the binaries that the images are made of, and compares everything at the end.
# MEANDER_CHAOS_FAULTS, _SECONDS, _LONGEST and _SEED say how much; arguments are options of the same meaning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" = 0 ] || { echo "it takes root: it has a network and mounts of its own" >&2; exit 1; }
tests/setup.sh base rust kafka postgres chaos
eval "$(tests/setup.sh env)"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}
deploy/build-binaries.sh
cargo build -q --locked -p meander-chaos
# Of this checkout: others may have the same target folder.
report=dist/chaos.json
status=0
# In namespaces of its own it can lose packets and fill disks.
unshare --net --mount sh -c 'ip link set lo up && exec "$@"' chaos \
  env MEANDER_DIST="$PWD/dist" "CARGO_BIN_EXE_meander-runtime=$PWD/dist/meander-runtime" \
  "$CARGO_TARGET_DIR/debug/meander-chaos" run --report "$report" "$@" || status=$?
[ "$status" != 0 ] || echo "$report has the figures"
exit "$status"
