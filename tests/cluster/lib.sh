# shellcheck shell=bash
# What cluster.sh and apiserver.sh share: keys, kubeconfigs, the API server's
# settings, waiting, and ending exactly the processes that were started.

# until_true SECONDS WHAT COMMAND...: waits for a condition, with a deadline.
until_true() {
  local deadline=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || { log "gave up waiting until $what"; return 1; }
    sleep 0.1
  done
}

# A process is known by its number together with the time it started at, since
# numbers are used again.
start_time() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  # The second field, in parentheses, may itself hold blanks.
  # shellcheck disable=SC2086
  set -- ${stat##*) }
  [ "$1" != Z ] && echo "${20}"
}

# is_running PID START
is_running() { [ "$(start_time "$1")" = "$2" ]; }

# end_process SIGNAL PID START: signals that process alone and waits for its end.
end_process() {
  is_running "$2" "$3" || return 0
  kill "-$1" "$2" 2>/dev/null || true
  if ! until_true 20 "process $2 ends" not_running "$2" "$3"; then
    kill -KILL "$2" 2>/dev/null || true
    until_true 10 "process $2 is gone" not_running "$2" "$3"
  fi
}
not_running() { ! is_running "$@"; }

# make_ca DIR: ca.crt and ca.key.
make_ca() {
  openssl req -x509 -config <(request_config) -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
    -keyout "$1/ca.key" -out "$1/ca.crt" -days 3650 -subj /CN=meander-test-ca \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
}

# issue DIR FILE SUBJECT [ALTERNATIVE NAMES]: FILE.crt and FILE.key, good for
# both ends of a connection.
issue() {
  openssl req -x509 -config <(request_config) -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
    -CA "$1/ca.crt" -CAkey "$1/ca.key" -keyout "$1/$2.key" -out "$1/$2.crt" -days 3650 -subj "$3" \
    -addext basicConstraints=critical,CA:FALSE -addext keyUsage=critical,digitalSignature \
    -addext extendedKeyUsage=serverAuth,clientAuth ${4:+-addext "subjectAltName=$4"} 2>/dev/null
}
request_config() { printf '[req]\ndistinguished_name=dn\n[dn]\n'; }

# make_service_account_key DIR: what service-account tokens are signed with.
make_service_account_key() {
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1/sa.key" 2>/dev/null
  openssl pkey -in "$1/sa.key" -pubout -out "$1/sa.pub"
}

# kubeconfig SERVER PKI FILE: prints one for the client certificate FILE.
kubeconfig() {
  cat <<EOF
apiVersion: v1
kind: Config
clusters:
  - name: meander
    cluster: {server: "$1", certificate-authority-data: $(base64 -w0 "$2/ca.crt")}
users:
  - name: $3
    user: {client-certificate-data: $(base64 -w0 "$2/$3.crt"), client-key-data: $(base64 -w0 "$2/$3.key")}
contexts:
  - name: meander
    context: {cluster: meander, user: $3}
current-context: meander
EOF
}

# api_server_flags PKI ETCD SERVICE_CIDR: one a line.
api_server_flags() {
  cat <<EOF
--allow-privileged=true
--authorization-mode=Node,RBAC
--client-ca-file=$1/ca.crt
--enable-admission-plugins=NodeRestriction
--etcd-servers=$2
--kubelet-certificate-authority=$1/ca.crt
--kubelet-client-certificate=$1/admin.crt
--kubelet-client-key=$1/admin.key
--kubelet-preferred-address-types=InternalIP
--profiling=false
--service-account-issuer=https://kubernetes.default.svc.cluster.local
--service-account-key-file=$1/sa.pub
--service-account-signing-key-file=$1/sa.key
--service-cluster-ip-range=$3
--tls-cert-file=$1/apiserver.crt
--tls-private-key-file=$1/apiserver.key
EOF
}

# api_ready SERVER PKI
api_ready() {
  curl -sf --max-time 2 --cacert "$2/ca.crt" --cert "$2/admin.crt" --key "$2/admin.key" "$1/readyz"
}
