#!/usr/bin/env bash
# The node's first process: it runs as number 1 of its own process, mount and
# network namespaces, so that whatever is started here, its mounts and its
# network included, ends when this process does.
#
#   node.sh STATE KUBE_BIN    with the settings of STATE/etc/node.env
set -euo pipefail
state=$1 kube_bin=$2
# shellcheck source=/dev/null
. "$state/etc/node.env"

# Read while /proc is still the machine's: the number by which the machine
# knows this process, and when it started. Written last, when the name spaces
# are there to be joined.
read -r -a me </proc/self/stat

# Folders whose place is fixed in the programs, or has to be short because
# socket paths are, get the node's own content. The machine's is hidden.
mkdir -p "$state"/run/{state,bin} "$state"/var/{lib,log,tmp} "$state"/tmp
chmod 1777 "$state"/tmp "$state"/var/tmp
ln -sfn /run "$state/var/run"
mount --make-rshared /
mount --bind "$state" "$state/run/state"
mount --bind "$kube_bin" "$state/run/bin"
mount --rbind "$state/run" /run
# By their places under /run: the state may itself lie in a folder that is hidden here.
mount --bind /run/state/tmp /tmp
mount --bind /run/state/var /var
mount -t proc proc /proc
# An image that was not loaded is asked for at its registry: here that is a
# clear no from the cluster's own name server, not a wait for an outer one.
mount --bind /run/state/etc/cluster-resolv.conf /etc/resolv.conf || true
cd /
export PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/var/tmp
mkdir -p /var/lib/{etcd,containerd,kubelet,cni} /var/log/{pods,containers,node}
[ "$IMAGES" != memory ] || mount -t tmpfs -o size=8g,mode=711 images /var/lib/containerd

ip link set lo up
echo "${me[0]} ${me[21]}" >/run/state/init.new
mv /run/state/init.new /run/state/init
# The other end of the cable is plugged in from outside.
for ((i = 0; i < 200; i++)); do
  ip -4 route show default 2>/dev/null | grep -q . && break
  sleep 0.05
done
echo 1 >/proc/sys/net/ipv4/ip_forward

# serve NAME COMMAND...: runs a program for ever; one that ends is started
# again, as the machine's service manager would.
serve() {
  local name=$1; shift
  while :; do
    "$@" >>"/var/log/node/$name.log" 2>&1 || true
    echo "--- $name ended, starting it again" >>"/var/log/node/$name.log"
    sleep 0.5
  done &
}

serve etcd etcd --data-dir=/var/lib/etcd --unsafe-no-fsync --name=node \
  --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
  --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380 \
  --initial-cluster=node=http://127.0.0.1:2380 --auto-compaction-retention=1h
mapfile -t flags <"/run/state/etc/kube-apiserver.flags"
serve kube-apiserver kube-apiserver "${flags[@]}"
serve containerd containerd --config=/run/state/etc/containerd.toml
until curl -sf --max-time 2 --cacert /run/state/pki/ca.crt "https://$NODE_IP:6443/readyz" >/dev/null 2>&1; do sleep 0.1; done

# The controller manager makes a volume's folder for root alone, but pods run as
# anybody; the folder is opened up before the volume is even announced.
mkdir -p /tmp/hostpath_pv
open_volumes() {
  local folder
  inotifywait -q -m -e create --format %w%f /tmp/hostpath_pv |
    while read -r folder; do chmod 777 "$folder"; done
}
serve open-volumes open_volumes
serve kube-controller-manager kube-controller-manager \
  --kubeconfig=/run/state/etc/kube-controller-manager.kubeconfig \
  --bind-address=127.0.0.1 --leader-elect=false --use-service-account-credentials \
  --root-ca-file=/run/state/pki/ca.crt --service-account-private-key-file=/run/state/pki/sa.key \
  --cluster-signing-cert-file=/run/state/pki/ca.crt --cluster-signing-key-file=/run/state/pki/ca.key \
  --cluster-cidr="$POD_CIDR" --enable-hostpath-provisioner --profiling=false
serve kube-scheduler kube-scheduler --kubeconfig=/run/state/etc/kube-scheduler.kubeconfig \
  --bind-address=127.0.0.1 --leader-elect=false --profiling=false
serve kubelet kubelet --config=/run/state/etc/kubelet.yaml --kubeconfig=/run/state/etc/kubelet.kubeconfig \
  --hostname-override="$NODE_NAME" --node-ip="$NODE_IP"
serve kube-proxy kube-proxy --config=/run/state/etc/kube-proxy.yaml
serve coredns coredns -conf /run/state/etc/Corefile -p 53 -quiet

# Processes whose parents are gone become this one's children, and are reaped.
while :; do wait || true; sleep 1; done
