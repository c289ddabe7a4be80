#!/usr/bin/env bash
# Builds the project's images from the static binaries in dist/.
#
#   deploy/build-images.sh [--out DIR] [operator|runtime|demo]...
#
# Without names, those whose binary is there. With a Docker engine the images
# are left in it; without one they become archives in DIR (default dist/images)
# for 'tests/cluster/cluster.sh load-image'. What was built is printed on
# standard output, an image or an archive a line; the sizes on standard error.
#   MEANDER_DIST (dist), MEANDER_REGISTRY (ghcr.io/meander-dev), MEANDER_TAG (dev)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dist=${MEANDER_DIST:-$here/../dist}
out=$dist/images
registry=${MEANDER_REGISTRY:-ghcr.io/meander-dev}
tag=${MEANDER_TAG:-dev}

die() { echo "error: $*" >&2; exit 1; }
has_docker() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }

# What the image takes from dist/, the program itself first.
files_of() {
  case $1 in
    operator | runtime) echo "meander-$1" ;;
    demo) echo "meander-workload meander-verify proto" ;;
    *) die "unknown image $1; there are operator, runtime, demo" ;;
  esac
}

certificates() {
  local file
  for file in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
    [ ! -f "$file" ] || { echo "$file"; return; }
  done
  die "no certificate authorities on this machine (Debian: package ca-certificates)"
}

# with_docker TARGET NAME CONTEXT
with_docker() {
  docker build -q -f "$here/Dockerfile" --target "$1" -t "$2" "$3" >/dev/null
  docker image inspect -f '{{.Size}}' "$2" | report "$2"
  echo "$2"
}

# with_buildah TARGET NAME CONTEXT: in a storage of its own, which goes with the context.
with_buildah() {
  local archive=$out/meander-$1.tar buildah=(buildah --root "$3/storage" --runroot "$3/run" --storage-driver vfs)
  "${buildah[@]}" bud -q --isolation chroot -f "$here/Dockerfile" --target "$1" -t "$2" "$3" >/dev/null
  mkdir -p "$out"
  rm -f "$archive.new"
  "${buildah[@]}" push -q "$2" "oci-archive:$archive.new:$2"
  mv "$archive.new" "$archive"
  stat -c %s "$archive" | report "$2, compressed"
  echo "$archive"
}

report() { awk -v name="$1" '{ printf "%s: %.1f MB\n", name, $1 / 1e6 }' >&2; }

build() {
  local target=$1 context file
  # Only what the image takes is sent, not the whole checkout.
  mkdir "$work/$target" && context=$work/$target
  mkdir "$context/dist"
  for file in $(files_of "$target"); do
    [ -e "$dist/$file" ] || die "$dist/$file is missing; build it first (make binaries)"
    cp -r --reflink=auto "$dist/$file" "$context/dist/"
  done
  cp "$(certificates)" "$context/dist/ca-certificates.crt"
  # An umask must not make an image that only root can run.
  chmod -R u=rwX,go=rX "$context/dist"
  "$engine" "$target" "$registry/meander-$target:$tag" "$context"
}

targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?a folder}; shift ;;
    *) targets+=("$1") ;;
  esac
  shift
done
if [ ${#targets[@]} = 0 ]; then
  for target in operator runtime demo; do
    read -r program _ < <(files_of "$target")
    [ ! -f "$dist/$program" ] || targets+=("$target")
  done
fi
[ ${#targets[@]} -gt 0 ] || die "no binary in $dist"

if has_docker; then engine=with_docker
elif command -v buildah >/dev/null; then engine=with_buildah
else die "needs a Docker engine or buildah (tests/setup.sh cluster installs it)"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for target in "${targets[@]}"; do build "$target"; done
