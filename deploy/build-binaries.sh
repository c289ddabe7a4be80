#!/usr/bin/env bash
# Builds the static binaries that the images are made of, into dist/.
#
# What was built from the same sources before, in whichever checkout, is taken from the cache: Cargo would build the project's own crates
# again in each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/cluster/versions.sh
. tests/cluster/versions.sh
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}
# Of glibc, since copying memory, which librdkafka and we do for each record, costs several times as much in musl.
export RUSTFLAGS="-C target-feature=+crt-static"
glibc=$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)
# In an older one, names are looked up by libraries that a static binary does not have.
[ "$(printf '2.34\n%s\n' "$glibc" | sort -V | head -n 1)" = 2.34 ] || die "glibc $glibc is too old: it has to be 2.34 or later"

build() {
  local out=$1
  cargo build --release --locked --target "$RUST_TARGET" -p meander-operator -p meander-runtime -p meander-workload || return
  cp "$CARGO_TARGET_DIR/$RUST_TARGET"/release/meander-{operator,runtime,workload} "$out/" || return
  (cd tests/verifier && CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$out/meander-verify" .) || return
  mkdir -p "$out/proto/meander/v1" && cp proto/meander/v1/change.proto "$out/proto/meander/v1/"
}

# The content of every file that a binary is made of, and its name; tests are none of them. And the C library.
sources=$({ echo "$glibc"; git ls-files -co --exclude-standard -- Cargo.lock rust-toolchain.toml '*Cargo.toml' crds/src operator/src proto \
  runtime/src runtime/config traces/src tests/workload/src tests/verifier tests/cluster/versions.sh deploy/build-binaries.sh |
  sort | while read -r file; do [ ! -f "$file" ] || sha256sum "$file"; done; } | sha256sum | cut -c1-16)
built=$MEANDER_CACHE/dist-$sources
in_place "$built" build
rm -rf dist/meander-* dist/proto
mkdir -p dist
cp -r "$built"/. dist/
