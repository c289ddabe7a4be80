#!/usr/bin/env bash
# A throw-away Kubernetes cluster: kind where there is a Docker engine, else one
# node made of the real programs in namespaces of its own (root, Linux).
#
#   cluster.sh up                   makes it, or finds it already there
#   cluster.sh down                 ends it and leaves nothing behind
#   cluster.sh load-image WHAT...   image archives, or names of local images
#   cluster.sh kubeconfig           prints the path of an administrator's kubeconfig
#   cluster.sh status               what it is and whether it is well
#   cluster.sh env                  shell lines that export KUBECONFIG and the tools' PATH
#   cluster.sh exec COMMAND...      runs a command with these, and with the
#                                   cluster's names resolvable (local node only)
#   cluster.sh node COMMAND...      runs a command inside the node, among its
#                                   processes and mounts
#   cluster.sh logs [NAME]          the programs of the local node, or one's log
#   cluster.sh backend              prints kind or node
#
# MEANDER_CLUSTER names it (default: meander); several can exist side by side.
# MEANDER_CLUSTER_IMAGES=memory or disk says where the local node keeps images
# (default: memory if 12 GiB are free).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/cluster/versions.sh
. "$here/versions.sh"
# shellcheck source=tests/cluster/lib.sh
. "$here/lib.sh"

name=${MEANDER_CLUSTER:-meander}
[[ $name =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] || die "MEANDER_CLUSTER must be a short lower-case name, not '$name'"
state=$MEANDER_CACHE/cluster-$name
config=$state/kubeconfig
PATH=$TOOLS_PATH:$PATH

kind_usable() { command -v kind >/dev/null && docker info >/dev/null 2>&1; }

# A cluster that exists stays what it was made as.
backend() {
  if [ -f "$state/backend" ]; then cat "$state/backend"
  elif kind_usable; then echo kind
  else echo node
  fi
}

# --- kind ---------------------------------------------------------------------

kind_up() {
  if ! kind get clusters 2>/dev/null | grep -qx "$name"; then
    mkdir -p "$state"
    echo kind >"$state/backend"
    kind create cluster --name "$name" --config "$here/../../kind-config.yaml" --kubeconfig "$config" --wait 120s >&2
  elif [ ! -f "$state/backend" ]; then
    die "there is a kind cluster named $name that was not made here; set MEANDER_CLUSTER to another name"
  fi
  log "cluster $name is up: export KUBECONFIG=$config"
}

kind_down() { kind delete cluster --name "$name" --kubeconfig "$config" >&2; rm -rf "$state"; }

kind_load_image() {
  local image
  for image; do
    if [ -f "$image" ]; then kind load image-archive --name "$name" "$image" >&2
    else kind load docker-image --name "$name" "$image" >&2
    fi
  done
}

kind_status() { kubectl --kubeconfig "$config" get nodes -o wide; }
kind_exec() { KUBECONFIG=$config exec "$@"; }
kind_node() { exec docker exec -i "$name-control-plane" "$@"; }
kind_logs() { docker exec "$name-control-plane" journalctl --no-pager ${1:+-u "$1"}; }

# --- the local node -----------------------------------------------------------

# Whether the node's first process is the one that was started here.
node_alive() {
  [ -f "$state/init" ] || return 1
  read -r init_pid init_start <"$state/init"
  is_running "$init_pid" "$init_start"
}

# Short, since the kernel allows fifteen characters.
interface() { printf 'mdr-%s' "$(printf %s "$name" | sha256sum | cut -c1-8)"; }

# 10.N.0.0/16 is one cluster's: the host has 10.N.0.1, the node 10.N.0.2, pods
# and services halves of the rest. The first N is taken, from a place that the
# name decides, that no route of this machine but the default one touches.
choose_network() {
  local first i n
  first=$(($(printf %s "$name" | cksum | cut -d' ' -f1) % 100))
  for ((i = 0; i < 100; i++)); do
    n=$((100 + (first + i) % 100))
    if [ -z "$(ip -4 route show root "10.$n.0.0/16")$(ip -4 route show match "10.$n.0.0/16" | grep -v ^default)" ]; then
      echo "10.$n"
      return
    fi
  done
  die "no free network in 10.100.0.0 to 10.199.0.0"
}

write_settings() {
  local net=$1 file snapshotter=overlayfs images=disk
  # Images are synced to disk as they are loaded, which beside a build takes a
  # minute and not seconds; they can be had again, so memory is good enough.
  [ "$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)" -lt 12 ] || images=memory
  # An overlay cannot lie on an overlay, as the disk of a container is one.
  [ "$(stat -f -c %T "$state")" != overlayfs ] || snapshotter=native
  mkdir -p "$state/etc"
  cat >"$state/etc/node.env" <<EOF
NODE_NAME=$name
NODE_IP=$net.0.2
GATEWAY=$net.0.1
POD_CIDR=$net.64.0/18
SERVICE_CIDR=$net.128.0/18
CGROUP=/meander-$name
IMAGES=${MEANDER_CLUSTER_IMAGES:-$images}
EOF
  cp -r "$here"/node/. "$state/etc/"
  for file in containerd.toml kubelet.yaml kube-proxy.yaml Corefile objects.yaml cni/10-pods.conflist; do
    sed -i "s|@NODE_NAME@|$name|g; s|@NODE_IP@|$net.0.2|g; s|@POD_CIDR@|$net.64.0/18|g
      s|@CGROUP@|/meander-$name|g; s|@SNAPSHOTTER@|$snapshotter|g" "$state/etc/$file"
  done
  : >"$state/etc/upstream-resolv.conf"
  printf 'nameserver %s\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n' \
    "$net.0.2" >"$state/etc/cluster-resolv.conf"
  {
    api_server_flags /run/state/pki http://127.0.0.1:2379 "$net.128.0/18"
    echo "--advertise-address=$net.0.2"
    echo "--secure-port=6443"
  } >"$state/etc/kube-apiserver.flags"
}

write_keys() {
  local net=$1 pki=$state/pki who
  local server=https://$net.0.2:6443
  mkdir -m 700 "$pki"
  make_ca "$pki"
  make_service_account_key "$pki"
  issue "$pki" apiserver /CN=kube-apiserver \
    "IP:$net.0.2,IP:$net.128.1,IP:127.0.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
  issue "$pki" admin /O=system:masters/CN=admin
  issue "$pki" kubelet "/O=system:nodes/CN=system:node:$name" "IP:$net.0.2,DNS:$name"
  for who in kube-controller-manager kube-scheduler kube-proxy; do
    issue "$pki" "$who" "/CN=system:$who"
  done
  for who in admin kubelet kube-controller-manager kube-scheduler kube-proxy; do
    kubeconfig "$server" "$pki" "$who" >"$state/etc/$who.kubeconfig"
  done
  install -m 600 "$state/etc/admin.kubeconfig" "$config"
}

# Every control group folder of this cluster: one in version 2 of the system, one
# for each hierarchy in version 1.
cgroup_roots() {
  local base
  if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
    echo /sys/fs/cgroup
  else
    findmnt -rn -t cgroup,cgroup2 -o TARGET | sort -u
  fi | while read -r base; do echo "$base/meander-$name"; done
}

make_cgroups() {
  local dir file
  while read -r dir; do
    mkdir -p "$dir"
    # In version 1 a new group has no processor and no memory until it is told.
    for file in cpuset.cpus cpuset.mems; do
      [ ! -f "$dir/$file" ] || [ ! -f "$dir/tasks" ] || cat "$dir/../$file" >"$dir/$file"
    done
  done < <(cgroup_roots)
}

cgroups_removed() {
  local dir
  while read -r dir; do
    [ ! -d "$dir" ] || find "$dir" -depth -type d -exec rmdir {} + || return 1
  done < <(cgroup_roots)
}

# The one image that has to be there before any pod can start.
write_pause_image() {
  local work layer
  work=$(mktemp -d "$state/.pause-XXXXXX")
  tar -C "$KUBE_DIR" --owner=0 --group=0 --mtime=@0 -cf "$work/layer.tar" pause
  layer=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
  printf '{"architecture":"%s","os":"linux","config":{"Entrypoint":["/pause"],"User":"65535:65535"},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$(dpkg --print-architecture)" "$layer" >"$work/config.json"
  printf '[{"Config":"config.json","RepoTags":["meander.local/pause:1"],"Layers":["layer.tar"]}]' >"$work/manifest.json"
  tar -C "$work" -cf "$state/pause.tar" manifest.json config.json layer.tar
  rm -rf "$work"
}

# in_node COMMAND...: inside the node, as its own programs run.
in_node() {
  node_alive || die "cluster $name is not up"
  nsenter -t "$init_pid" -m -n -p -- "$@"
}

plug_in() {
  local net=$1 link
  link=$(interface)
  node_alive
  ip link add "$link" type veth peer name eth0 netns "$init_pid"
  ip addr add "$net.0.1/24" dev "$link"
  ip link set "$link" up
  nsenter -t "$init_pid" -n -- sh -ec "ip addr add $net.0.2/24 dev eth0; ip link set eth0 up; ip route add default via $net.0.1"
  # Pods and services as well are behind the node's address.
  ip route add "$net.0.0/16" via "$net.0.2" dev "$link"
}

import_image() { in_node ctr --address /run/containerd/containerd.sock -n k8s.io images import - ; }

node_ready() {
  kubectl --kubeconfig "$config" get node "$name" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' | grep -qx True &&
    kubectl --kubeconfig "$config" -n default get serviceaccount default
}

check_tools() {
  [ "$(id -u)" = 0 ] || die "without a Docker engine and kind, a cluster needs root"
  "$MEANDER_TESTS/setup.sh" cluster >&2
}

node_server() {
  # shellcheck source=/dev/null
  . "$state/etc/node.env"
  echo "https://$NODE_IP:6443"
}

node_up() {
  local start=$SECONDS net server
  if node_alive && api_ready "$(node_server)" "$state/pki" >/dev/null; then
    log "cluster $name is up"
    return
  fi
  check_tools
  if [ -d "$state" ]; then
    log "cluster $name is not well; making it anew"
    node_down
  fi
  net=$(choose_network)
  server=https://$net.0.2:6443
  mkdir -p "$state"
  echo node >"$state/backend"
  write_settings "$net"
  write_keys "$net"
  write_pause_image
  make_cgroups
  # In a session of its own, so that the caller's end or terminal is not the node's.
  setsid unshare --net --mount --pid --uts --ipc --fork --kill-child --propagation private \
    bash "$state/etc/node.sh" "$state" "$KUBE_DIR/bin" </dev/null >"$state/node.log" 2>&1 &
  disown
  until_true 10 "the node's namespaces exist" node_alive || { cat "$state/node.log" >&2; exit 1; }
  plug_in "$net"
  # The image first: the kubelet starts only after the API server.
  until_true 30 "containerd answers" import_pause
  until_true 60 "the API server is ready" api_ready "$server" "$state/pki"
  kubectl --kubeconfig "$config" apply -f "$state/etc/objects.yaml" >/dev/null
  until_true 60 "the node is ready" node_ready
  until_true 30 "the name server is ready" in_node curl -sf --max-time 1 http://127.0.0.1:8181/ready
  log "cluster $name is up after $((SECONDS - start)) s: export KUBECONFIG=$config"
}

import_pause() { import_image <"$state/pause.tar"; }

node_down() {
  local link
  link=$(interface)
  # Ending the first process ends the namespaces, and with them every process,
  # mount and address of the node, pods included.
  if node_alive; then
    kill -KILL "$init_pid"
    until_true 30 "the node has ended" not_running "$init_pid" "$init_start"
  fi
  ! ip link show "$link" >/dev/null 2>&1 || ip link delete "$link" 2>/dev/null || true
  until_true 20 "the control groups of cluster $name are removed" cgroups_removed
  rm -rf "$state"
}

node_load_image() {
  local image archive
  for image; do
    if [ -f "$image" ]; then
      import_image <"$image" >&2
      continue
    fi
    archive=$(mktemp "$state/image-XXXXXX")
    if command -v docker >/dev/null && docker image inspect "$image" >/dev/null 2>&1; then
      docker save -o "$archive" "$image"
    else
      rm -f "$archive"
      buildah --storage-driver vfs push -q "$image" "docker-archive:$archive:$image" || die "$image is neither a file nor a local image"
    fi
    import_image <"$archive" >&2
    rm -f "$archive"
  done
}

node_status() {
  # shellcheck source=/dev/null
  . "$state/etc/node.env"
  node_alive || { echo "cluster $name: its processes are gone; run 'cluster.sh up'"; return 1; }
  echo "cluster $name: node $NODE_IP, pods $POD_CIDR, services $SERVICE_CIDR, this machine $GATEWAY, first process $init_pid"
  kubectl --kubeconfig "$config" get nodes,pods -A
}

node_exec() {
  node_alive || die "cluster $name is not up"
  # shellcheck disable=SC2016 # the inner shell expands it
  KUBECONFIG=$config exec unshare --mount --propagation private bash -c \
    'mount --bind "$0" /etc/resolv.conf && exec "$@"' "$state/etc/cluster-resolv.conf" "$@"
}

node_node() { in_node "$@"; }

node_logs() {
  if [ $# -gt 0 ]; then cat "$state/var/log/node/$1.log"; else (cd "$state/var/log/node" && ls); fi
}

# --- commands -----------------------------------------------------------------

exists() { [ -d "$state" ]; }

# One at a time changes clusters: networks are chosen by looking at the routes.
locked() {
  mkdir -p "$MEANDER_CACHE"
  exec 9>"$MEANDER_CACHE/cluster.lock"
  flock 9
  # What stays running must not hold the lock.
  "$@" 9>&-
}

environment() {
  # shellcheck disable=SC2016 # the reader's shell expands it
  printf 'export KUBECONFIG=%q PATH=%q:"$PATH"\n' "$config" "$TOOLS_PATH"
}

main() {
  local command=${1:-}; shift || true
  case $command in
    up) locked "$(backend)_up" ;;
    down) if exists; then locked "$(backend)_down"; log "cluster $name is gone"; fi ;;
    kubeconfig) echo "$config" ;;
    env) environment ;;
    backend) backend ;;
    load-image | status | exec | node | logs)
      exists || die "cluster $name is not up"
      "$(backend)_${command/-/_}" "$@"
      ;;
    *) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
}
main "$@"
