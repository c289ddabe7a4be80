# shellcheck shell=bash
# What the tests on a cluster share: how a test is run and said, and what is looked at. It is sourced from the project's folder, with MEANDER_CLUSTER set.
cluster=tests/cluster/cluster.sh
system=meander-system
namespace=shop
status=0

k() { kubectl -n "$namespace" "$@"; }

# promise TITLE COMMAND...: one test.
promise() {
  local title=$1 code; shift
  rm -f "$work/notes"
  # Not within the `if`: there, no command but the last one could fail.
  set +e
  (set -e; "$@") >"$work/log" 2>&1
  code=$?
  set -e
  if [ "$code" = 0 ]; then
    echo "ok - $title"
    [ ! -f "$work/notes" ] || sed 's/^/#   /' "$work/notes"
  else
    echo "not ok - $title"
    sed 's/^/#   /' "$work/log"
    diagnose | sed 's/^/#   /'
    status=1
  fi
}

# note TEXT: something measured, said beside the test's result.
note() { echo "$*" >>"$work/notes"; }

diagnose() {
  k get cdcp,rpj,jobs,pods -o wide || true
  k get cdcp,rpj -o jsonpath='{range .items[*]}{.kind} {.metadata.name}{range .status.conditions[*]}{"\n  "}{.type}={.status} {.reason}: {.message}{end}{"\n"}{end}' || true
  kubectl -n "$system" logs deployment/meander-operator --tail=30 || true
  k logs -l app.kubernetes.io/managed-by=meander-operator --tail=20 --prefix || true
}

finish() {
  local code=$?
  [ -z "${watch:-}" ] || kill "$watch" 2>/dev/null || true
  [ -n "${KEEP:-}" ] || "$cluster" down >/dev/null 2>&1 || true
  rm -rf "$work"
  exit $((code > status ? code : status))
}

# condition KIND/NAME TYPE STATUS [REASON]: waits for it.
condition() {
  local where=$1 type=$2 value=$3 reason=${4:-}
  k wait "$where" --for=jsonpath="{.status.conditions[?(@.type==\"$type\")].status}=$value" --timeout=240s
  [ -z "$reason" ] ||
    k wait "$where" --for=jsonpath="{.status.conditions[?(@.type==\"$type\")].reason}=$reason" --timeout=240s
}

retry() { # TIMES COMMAND...
  local times=$1; shift
  until "$@"; do [ $((times -= 1)) -gt 0 ] || return 1; done
}

run_job() { # FILE NAME
  k delete job "$2" --ignore-not-found --wait
  k apply -f "$1"
  k wait --for=jsonpath='{.status.conditions[?(@.type=="Complete")].status}'=True "job/$2" --timeout=900s ||
    { k logs "job/$2" --tail=50; return 1; }
}

install() {
  helm upgrade --install meander charts/meander -n "$system" --create-namespace --wait --timeout 240s
  helm test meander -n "$system" --logs --timeout 240s
}

pipeline_becomes_ready() {
  k apply -f deploy/examples/pipeline.yaml
  k wait --for=condition=Ready cdcpipeline/trades --timeout=240s
  # After Snapshotting, which the rows that are there take a moment of.
  k wait cdcpipeline/trades --for=jsonpath='{.status.phase}'=Streaming --timeout=240s
}

add_standby() {
  k patch cdcp trades --type=merge -p '{"spec": {"runtime": {"standby": "Hot"}}}'
  k wait deployment/trades-capture --for=jsonpath='{.spec.replicas}'=2 --timeout=240s
  k rollout status deployment/trades-capture --timeout=240s
  k wait --for=condition=Ready cdcpipeline/trades --timeout=240s
}

# For as long as it takes; whoever starts it ends it.
load_for_long() {
  k delete job load --ignore-not-found --wait
  sed 's/"10000"/"1000000"/; s/restartPolicy: Never/restartPolicy: Never\n      terminationGracePeriodSeconds: 1/' deploy/demo/load.yaml | k apply -f -
}

micros() { date +%s%6N; }

# The pod that owns the slot of the pipeline `trades`; none while none does.
owner() {
  local pod address
  k get pods -l meander.dev/pipeline=trades -o json |
    jq -r '.items[] | select(.metadata.deletionTimestamp == null and .status.podIP != null) | "\(.metadata.name) \(.status.podIP)"' |
    while read -r pod address; do
      if "$cluster" exec curl -sS --max-time 5 "http://$address:9464/metrics" </dev/null |
        grep -x 'meander_capture_owns_slot 1' >&2; then echo "$pod"; fi
    done
}

one_owner() { [ "$(owner | tee "$work/owner" | wc -l)" = 1 ]; }

# What each process that captures says of itself, as `PROCESS POD NAME VALUE`. It is asked from within its pod: this needs neither Kubernetes nor the pod's
# network.
capture_metrics() {
  # shellcheck disable=SC2016 # the node's shell expands it
  "$cluster" node sh -c 'for process in $(pgrep -x meander-runtime); do
      pod=$(nsenter -t "$process" -u hostname) &&
        nsenter -t "$process" -n curl -s --max-time 1 http://127.0.0.1:9464/metrics | sed -n "s/^meander_capture_/$process $pod /p"
    done 2>/dev/null; true' </dev/null
}

# How many changes were published, as the checkpoint counts them.
captured() { capture_metrics | awk '$2 ~ /^trades-capture-/ && $3 == "checkpoint_events" && $4 > most { most = $4 } END { print most + 0 }'; }

# Writes a line with the time whenever more changes were published than ever before, a few times a second.
watch_captured() {
  local now most=0
  while true; do
    now=$(captured) || continue
    [ "$now" -le "$most" ] || { most=$now; micros >>"$work/growth"; }
  done
}

# flows_again SINCE: waits until a change was published that had not been at this moment.
flows_again() {
  local at=0
  # An awk may read no line before there are many.
  while [ "$at" -le "$1" ] && read -r at; do :; done < <(timeout 240 tail -n +1 -f "$work/growth")
  [ "$at" -gt "$1" ]
}

# silence SINCE: for how many milliseconds, at the most, no change was published from then on.
silence() {
  awk -v last="$1" '$1 > last { if ($1 - last > most) most = $1 - last; last = $1 } END { print int(most / 1000) }' "$work/growth"
}

# network -I|-D ADDRESS: takes the network of the pod with this address away, or gives it back.
network() {
  local side
  for side in -s -d; do "$cluster" node iptables -t raw "$1" PREROUTING "$side" "$2" -j DROP; done
}

# A cluster with the services of development and the project's images, which ends with the script.
begin() {
  work=$(mktemp -d)
  trap finish EXIT
  make -s images >"$work/images"
  "$cluster" up
  eval "$("$cluster" env)"
  deploy/dev/up.sh "$namespace"
  while read -r image; do "$cluster" load-image "$image"; done <"$work/images"
}
