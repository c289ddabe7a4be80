# shellcheck shell=bash
# What the local tools are, and where they are kept. Sourced by the scripts of
# tests/ and deploy/. A tool's folder carries its version, so a new version is
# built beside the old one and an interrupted build is never taken for a good
# one (folders are filled elsewhere and moved into place).
# shellcheck disable=SC2034 # used by those that source this

RUST_TARGET=x86_64-unknown-linux-gnu
GO_MINOR=26                 # what the newest of the tools below asks for
KUBERNETES_VERSION=1.34.4   # also in go.mod, whose replaced modules follow it
HELM_VERSION=3.22.0
KUBECONFORM_VERSION=0.8.0
GRPCURL_VERSION=1.9.4
PROMETHEUS_OPERATOR_VERSION=0.85.0 # its CRDs, for the chart's monitors and rules
CARGO_DENY_VERSION=0.20.2
CARGO_CYCLONEDX_VERSION=0.5.9
KAFKA_VERSION=4.3.1         # also in kafka/pom.xml and ../differential/pom.xml
DEBEZIUM_VERSION=3.7.0.Final # also in ../differential/pom.xml and bench/src/peers.rs
DEBEZIUM_SERVER_VERSION=3.6.0.Final # also in bench/src/peers.rs; there is no newer one
DEBEZIUM_SERVER_SHA256=901ce7b0b75b4dafaac4aa57dac6dfcad5937f96fb7159e25d22759bbf5192e4
# The servers that the tests run against besides Debian's: version and SHA-256 of the archive inside the package.
POSTGRES_VERSIONS=(
  14.24.0:a22637a4a9904f6a7ed42ca0849f3db96f29a6d7dc719d9da8487fe4522e5017
  15.19.0:335beb3873692297bfa7712f09ef706114c28896e85ee83098f3aafaaa70b24a
  16.15.0:bda67fe32e23b049c25db4b98132d154a4fa824c44e1bd8fd01b0236f4676c24
  17.11.0:f044ba1009e9c7ed62a5a9a6f923ca6327fe4e80d8f6bf4f8887dbc59ac14bed
  18.6.0:63999c2914366d62c68e51794e597588c336e75ed2958d53c558e8deca5e13fc
)

MEANDER_TESTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MEANDER_CACHE=${MEANDER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/meander}

# Twelve characters that change with the content of the given files.
digest_of() { cat -- "$@" | sha256sum | cut -c1-12; }

KUBE_DIR=$MEANDER_CACHE/kube-$KUBERNETES_VERSION-$(digest_of "$MEANDER_TESTS"/cluster/go.mod "$MEANDER_TESTS"/cluster/main.go)
HELM_DIR=$MEANDER_CACHE/helm-$HELM_VERSION
KUBECONFORM_DIR=$MEANDER_CACHE/kubeconform-$KUBECONFORM_VERSION
CARGO_DENY_DIR=$MEANDER_CACHE/cargo-deny-$CARGO_DENY_VERSION
CARGO_CYCLONEDX_DIR=$MEANDER_CACHE/cargo-cyclonedx-$CARGO_CYCLONEDX_VERSION
GRPCURL_DIR=$MEANDER_CACHE/grpcurl-$GRPCURL_VERSION
PROMETHEUS_CRDS=$MEANDER_CACHE/prometheus-crds-$PROMETHEUS_OPERATOR_VERSION
KAFKA_HOME=$MEANDER_CACHE/kafka-$KAFKA_VERSION-$(digest_of "$MEANDER_TESTS"/cluster/kafka/pom.xml "$MEANDER_TESTS"/cluster/kafka/run-class.sh)
DEBEZIUM_HOME=$MEANDER_CACHE/debezium-$DEBEZIUM_VERSION-$(digest_of "$MEANDER_TESTS"/differential/pom.xml)
DEBEZIUM_SERVER_HOME=$MEANDER_CACHE/peer-debezium-server-$DEBEZIUM_SERVER_VERSION
TOOLS_PATH=$KUBE_DIR/bin:$HELM_DIR/bin:$KUBECONFORM_DIR/bin:$GRPCURL_DIR/bin:$CARGO_DENY_DIR/bin

# log MESSAGE...: progress, on standard error so that output can be captured.
log() { printf '%s\n' "$*" >&2; }
die() { log "error: $*"; exit 1; }

# in_place DIR COMMAND...: fills DIR by COMMAND, which is given a folder to fill,
# unless DIR is there already. Several at once are safe: the first one wins.
in_place() {
  local target=$1 work; shift
  [ ! -d "$target" ] || return 0
  mkdir -p "$(dirname "$target")" || return
  work=$(mktemp -d "$(dirname "$target")/.making-XXXXXX") || return
  if ! "$@" "$work"; then rm -rf "$work"; return 1; fi
  chmod 755 "$work"
  mv -T "$work" "$target" 2>/dev/null || { rm -rf "$work"; [ -d "$target" ]; }
}
