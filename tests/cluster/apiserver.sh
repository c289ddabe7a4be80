#!/usr/bin/env bash
# A real API server and nothing behind it, for tests of what it decides itself:
# schemas, validation, defaults, server-side apply, conflicts, RBAC, tokens. No
# controller runs: no garbage collection, no pods from Deployments, namespaces
# stay Terminating. Needs no root.
#
#   apiserver.sh up DIR     etcd and kube-apiserver on free ports of loopback,
#                           data in DIR (best on a memory disk, /dev/shm/...),
#                           an administrator's DIR/kubeconfig, and in DIR/audit.log
#                           what service accounts ask
#   apiserver.sh stop DIR   kills the API server, and leaves etcd and DIR
#   apiserver.sh start DIR  starts it again where it was
#   apiserver.sh down DIR   ends just these two, and removes DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/cluster/versions.sh
. "$here/versions.sh"
# shellcheck source=tests/cluster/lib.sh
. "$here/lib.sh"

command=${1:-} dir=${2:-}
[ -n "$dir" ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# Below the range from which the kernel takes ports for outgoing connections.
free_port() {
  local port
  while :; do
    port=$((15000 + (RANDOM * 32768 + RANDOM) % 17000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# launch NAME COMMAND...: in the background, recorded in DIR/processes.
launch() {
  local name=$1; shift
  setsid "$@" </dev/null >"$dir/$name.log" 2>&1 &
  printf '%s %s %s\n' "$!" "$(start_time $!)" "$name" >>"$dir/processes"
  disown
}

all_running() {
  local pid start name
  while read -r pid start name; do is_running "$pid" "$start" || return 1; done <"$dir/processes"
}

# A process that has ended (its port was taken after all) ends the wait, too.
ready_or_failed() { api_ready "$server" "$dir/pki" || ! all_running; }

end_all() {
  local pid start name
  [ -f "$dir/processes" ] || return 0
  # The API server first: without etcd it takes long to stop.
  while read -r pid start name; do end_process TERM "$pid" "$start"; done < <(tac "$dir/processes")
  rm -f "$dir/processes"
}

start_once() {
  local etcd peer port
  etcd=$(free_port) peer=$(free_port) port=$(free_port)
  server=https://127.0.0.1:$port
  rm -rf "$dir/etcd"
  launch etcd etcd --data-dir="$dir/etcd" --unsafe-no-fsync --name=test \
    --listen-client-urls="http://127.0.0.1:$etcd" --advertise-client-urls="http://127.0.0.1:$etcd" \
    --listen-peer-urls="http://127.0.0.1:$peer" --initial-advertise-peer-urls="http://127.0.0.1:$peer" \
    --initial-cluster="test=http://127.0.0.1:$peer"
  {
    api_server_flags "$dir/pki" "http://127.0.0.1:$etcd" 10.96.0.0/16
    printf '%s\n' --bind-address=127.0.0.1 --secure-port="$port" --endpoint-reconciler-type=none \
      --audit-policy-file="$here/audit-policy.yaml" --audit-log-path="$dir/audit.log"
  } >"$dir/flags"
  launch_api_server
}

launch_api_server() {
  local flags
  mapfile -t flags <"$dir/flags"
  launch kube-apiserver "$KUBE_DIR/bin/kube-apiserver" "${flags[@]}"
  until_true 60 "the API server is ready" ready_or_failed && all_running
}

up() {
  local try
  if [ -f "$dir/kubeconfig" ] && [ -f "$dir/processes" ] && all_running; then return; fi
  if [ -e "$dir" ] && [ ! -f "$dir/processes" ] && [ -n "$(ls -A "$dir")" ]; then
    die "$dir is not empty and was not made here"
  fi
  if [ ! -x "$KUBE_DIR/bin/kube-apiserver" ] || ! command -v etcd >/dev/null; then
    "$MEANDER_TESTS/setup.sh" cluster >&2
  fi
  end_all
  rm -rf "$dir/pki" "$dir/kubeconfig"
  mkdir -p "$dir/pki"
  dir=$(cd "$dir" && pwd)
  make_ca "$dir/pki"
  make_service_account_key "$dir/pki"
  issue "$dir/pki" apiserver /CN=kube-apiserver IP:127.0.0.1,DNS:localhost
  issue "$dir/pki" admin /O=system:masters/CN=admin
  for try in 1 2 3; do
    if start_once; then
      (umask 077; kubeconfig "$server" "$dir/pki" admin >"$dir/kubeconfig.new")
      mv "$dir/kubeconfig.new" "$dir/kubeconfig"
      return
    fi
    log "try $try failed: $(tail -n 2 "$dir"/*.log)"
    end_all
  done
  die "no API server; see $dir/kube-apiserver.log"
}

stop() {
  local pid start name
  read -r pid start name < <(grep ' kube-apiserver$' "$dir/processes") || die "no API server runs in $dir"
  end_process KILL "$pid" "$start"
  sed -i '/ kube-apiserver$/d' "$dir/processes"
}

start() {
  server=$(sed -n 's/.*server: "\([^"]*\)".*/\1/p' "$dir/kubeconfig")
  launch_api_server || die "the API server does not start; see $dir/kube-apiserver.log"
}

case $command in
  up) up ;;
  stop) stop ;;
  start) start ;;
  down)
    [ -d "$dir" ] || exit 0
    [ -d "$dir/pki" ] || die "$dir was not made here"
    end_all
    rm -rf "$dir"
    ;;
  *) die "unknown command $command; there are up, stop, start and down" ;;
esac
