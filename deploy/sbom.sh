#!/usr/bin/env bash
# What the images are made of: a CycloneDX file for each program, in dist/, from the lock file and for the target that is built. A scanner sees
# nothing of it in a static binary.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/cluster/versions.sh
. tests/cluster/versions.sh
[ -d "$CARGO_CYCLONEDX_DIR" ] || tests/setup.sh sbom
PATH=$CARGO_CYCLONEDX_DIR/bin:$PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# It writes beside every Cargo.toml of the workspace.
git ls-files -z | tar -c --null -T - | tar -x -C "$work"
mkdir -p dist
glibc=$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)
for name in operator runtime; do
  cargo cyclonedx -q --manifest-path "$work/$name/Cargo.toml" --format json --target "$RUST_TARGET" --override-filename "meander-$name.cdx"
  # The C library is in the binary too, and no crate. The identifier is what scanners look it up by.
  jq --arg version "$glibc" '.components += [{type: "library", name: "glibc", version: $version,
      cpe: "cpe:2.3:a:gnu:glibc:\($version):*:*:*:*:*:*:*", licenses: [{license: {id: "LGPL-2.1-or-later"}}]}]' \
    "$work/$name/meander-$name.cdx.json" >"dist/meander-$name.cdx.json"
  jq -r '"\(.metadata.component.name) \(.metadata.component.version): \(.components | length) components"' "dist/meander-$name.cdx.json"
done
