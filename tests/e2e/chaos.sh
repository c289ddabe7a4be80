#!/usr/bin/env bash
# Breaks the control plane of a cluster, and the captures that it looks after, one after the other under load, and compares everything at the end.
#
#   MEANDER_CHAOS_SEED             decides which faults come, in which order, when and for how long; another one each time where it is not set
#   MEANDER_CHAOS_CLUSTER_FAULTS   how many (20)
#
#   chaos.sh total FILE            what several runs have found, whose reports are the lines of the file
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
export MEANDER_CLUSTER=${MEANDER_CLUSTER:-meander-chaos}
# shellcheck source=tests/e2e/lib.sh
. tests/e2e/lib.sh
seed=${MEANDER_CHAOS_SEED:-$(date +%s)}
faults=${MEANDER_CHAOS_CLUSTER_FAULTS:-20}
: "${MEANDER_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/meander}"
report=${CARGO_TARGET_DIR:-$MEANDER_CACHE/target}/chaos-cluster.json

# FUNCTION LEAST MOST OWNER TITLE: it holds for that many seconds, and the process that captures stays or moves to the other pod.
kinds=(
  "delete_leader 0 0 stays leading operator's pod deleted"
  "kill_leader 0 0 stays leading operator killed"
  "stop_leader 5 30 stays leading operator stopped"
  "kill_api_server 0 0 stays API server killed"
  "stop_api_server 5 20 stays API server stopped"
  "kill_etcd 0 0 stays etcd killed"
  "kill_controllers 0 0 stays controller manager and scheduler killed"
  "kill_kubelet 0 0 stays node agent killed"
  "stop_kubelet 5 60 stays node agent stopped"
  "kill_containerd 0 0 stays containerd killed"
  "delete_owner 0 0 moves owner's pod deleted"
  "kill_owner 0 0 moves owner killed"
  "cut_off_owner 1 10 moves owner's network cut"
  "kill_owner_without_api_server 1 10 moves owner killed, API server stopped"
  "kill_owner_without_kubelet 1 10 moves owner killed, node agent stopped"
)

# within SECONDS COMMAND...: waits until it succeeds.
within() {
  local deadline=$((SECONDS + $1)); shift
  until "$@"; do [ "$SECONDS" -lt "$deadline" ] || { echo "gave up: $*"; return 1; }; sleep 0.2; done
}

# signal SIGNAL PROGRAM [POD]: to its processes on the node, or to those in the pod.
signal() {
  # shellcheck disable=SC2016 # the node's shell expands it
  "$cluster" node sh -c 'found=
    for process in $(pgrep -x "$2"); do
      [ -z "$3" ] || [ "$(nsenter -t "$process" -u hostname)" = "$3" ] || continue
      kill "-$1" "$process" && found=yes
    done
    [ -n "$found" ]' sh "$1" "${2:0:15}" "${3:-}" </dev/null
}

# The pod of the operator that holds the lease.
leader() { kubectl -n "$system" get lease meander-operator -o jsonpath='{.spec.holderIdentity}'; }

# The process that owns the slot, and its pod, by what it says itself.
owning() { capture_metrics | awk '$3 == "owns_slot" && $4 == 1 { print $1, $2 }'; }
one_owning() { [ "$(owning | tee "$work/owning" | wc -l)" = 1 ]; }
owner_process() { cut -d ' ' -f 1 "$work/owning"; }
owner_pod() { cut -d ' ' -f 2 "$work/owning"; }

# Whether the same process as before owns the slot: one that lost it would not get it back by itself.
stayed() { [ "$(owning)" = "$(cat "$work/owning")" ]; }

# How many changes were published, at the least.
has_captured() { captured >"$work/published"; [ "$(cat "$work/published")" -gt 0 ]; }

# Whether another pod than before owns the slot.
moved() { [ -n "$(owning | awk -v before="$(owner_pod)" '$2 != before')" ]; }

# --- what goes wrong ------------------------------------------------------------
# To sleep is part of a fault: what it has stopped or cut off stays so for that long.

delete_leader() { kubectl -n "$system" delete pod "$(leader)" --grace-period=0 --force; }
kill_leader() { signal KILL meander-operator "$(leader)"; }

stop_leader() {
  local pod
  pod=$(leader)
  signal STOP meander-operator "$pod"
  sleep "$1"
  # After half a minute the node agent may have ended it.
  signal CONT meander-operator "$pod" || true
}

kill_api_server() { signal KILL kube-apiserver; }
kill_etcd() { signal KILL etcd; }
kill_controllers() { signal KILL kube-controller-manager; signal KILL kube-scheduler; }
kill_kubelet() { signal KILL kubelet; }
kill_containerd() { signal KILL containerd; }

stopped_for() { signal STOP "$1"; sleep "$2"; signal CONT "$1"; }
stop_api_server() { stopped_for kube-apiserver "$1"; }
stop_kubelet() { stopped_for kubelet "$1"; }

delete_owner() { k delete pod "$(owner_pod)" --grace-period=0 --force; within 60 moved; }
kill_owner() { "$cluster" node kill -KILL "$(owner_process)"; within 60 moved; }

cut_off_owner() {
  k get pod "$(owner_pod)" -o jsonpath='{.status.podIP}' >"$work/cut"
  network -I "$(cat "$work/cut")"
  within 60 moved
  sleep "$1"
  give_back_network
}

# kill_owner_without PROGRAM SECONDS: what stands by has to take over, and to go on, without it.
kill_owner_without() {
  signal STOP "$1"
  kill_owner
  flows_again "$(micros)"
  sleep "$2"
  signal CONT "$1"
}
kill_owner_without_api_server() { kill_owner_without kube-apiserver "$1"; }
kill_owner_without_kubelet() { kill_owner_without kubelet "$1"; }

give_back_network() {
  [ ! -f "$work/cut" ] || network -D "$(cat "$work/cut")"
  rm -f "$work/cut"
}

# Whatever a round that failed has left.
give_back() {
  local program
  for program in kube-apiserver kubelet meander-operator; do signal CONT "$program" || true; done
  give_back_network
}

# --- what is looked at ----------------------------------------------------------

api_server_answers() { kubectl get --raw /readyz --request-timeout=2s; }

# status_reached CHANGES: the pipeline's status tells of that many, and that it is not far behind.
status_reached() {
  local changes lag
  read -r changes lag < <(k get cdcp trades --request-timeout=5s \
    -o jsonpath='{.status.replication.eventsTotal} {.status.replication.lagMillis}{"\n"}') &&
    [ "${changes:-0}" -ge "$1" ] && [ "${lag:-10000}" -lt 10000 ]
}

none_holds() { # FILE: neither a password nor a panic is in it, and there is something
  [ -s "$1" ] || { echo "$1 is empty"; return 1; }
  if grep -m 1 -F -f "$work/passwords" "$1"; then echo "a password is in $1"; return 1; fi
  if grep -m 1 "panicked" "$1"; then echo "something panicked"; return 1; fi
}

# What a pod has said goes with the pod, so this is asked before each fault and after it.
logs_are_clean() {
  "$cluster" node sh -c "cat /var/log/pods/${system}_*/*/*.log" >"$work/operator.log"
  "$cluster" node sh -c "cat /var/log/pods/${namespace}_trades-capture-*/*/*.log" >"$work/capture.log"
  none_holds "$work/operator.log"
  none_holds "$work/capture.log"
}

# round NUMBER: the fault of the plan, until all is as it was.
round() {
  local fault=${plan_fault[$1]} owner=${plan_owner[$1]} title=${plan_title[$1]} seconds=${plan_seconds[$1]}
  local since over silent current
  trap give_back EXIT
  within 60 one_owning
  # The moment of the fault is the seed's.
  sleep "${plan_pause[$1]}"
  logs_are_clean
  since=$(micros)
  "$fault" "$seconds"
  over=$(micros)
  flows_again "$over"
  # What was seen first may have been asked before the fault was over.
  flows_again "$(micros)"
  silent=$(silence "$since")
  within 120 api_server_answers
  within 60 has_captured
  within 120 status_reached "$(cat "$work/published")"
  current=$((($(micros) - over) / 1000))
  condition cdcpipeline/trades Ready True
  note "no change was published for $silent ms at the most; the status was current $current ms after the fault"
  if [ "$owner" = stays ]; then
    within 30 stayed || { echo "another process captures: $(owning), before $(cat "$work/owning")"; return 1; }
  fi
  # A generous bound, since everything else runs on the same machine; the figure is what counts.
  [ "$silent" -lt 20000 ]
  within 120 one_owning
  kubectl wait node --all --for=condition=Ready --timeout=240s
  kubectl -n "$system" wait deployment/meander-operator --for=jsonpath='{.status.readyReplicas}'=2 --timeout=240s
  k wait deployment/trades-capture --for=jsonpath='{.status.readyReplicas}'=2 --timeout=400s
  logs_are_clean
  printf '%s\t%s\t%s\t%s\n' "$title" "$seconds" "$silent" "$current" >>"$work/rounds"
}

begin_load() {
  install
  helm upgrade meander charts/meander -n "$system" --reuse-values --set replicas=2 --wait --timeout 240s
  pipeline_becomes_ready
  add_standby
  load_for_long
  k wait --for=jsonpath='{.status.ready}'=1 job/load --timeout=240s
  k get secrets -o json | jq -r '.items[].data | (.password, .url) // empty | @base64d' | sort -u >"$work/passwords"
  [ -s "$work/passwords" ]
}

nothing_was_lost() {
  [ "$(k get job load -o jsonpath='{.status.active}')" = 1 ]
  k delete job load --cascade=foreground --wait
  run_job deploy/demo/verify.yaml verify
  k logs job/verify --tail=1 >"$work/verified"
  note "$(jq -er .postgres.changes "$work/verified") changes"
  within 60 one_owner
  condition cdcpipeline/trades Ready True
}

# What every process of a program says of itself, asked from within its pod.
metrics_of() {
  # shellcheck disable=SC2016 # the node's shell expands it
  "$cluster" node sh -c 'for process in $(pgrep -x "$1"); do
      nsenter -t "$process" -n curl -sf --max-time 5 http://127.0.0.1:9464/metrics || exit
    done' sh "${1:0:15}" </dev/null
}

nothing_was_told() {
  logs_are_clean
  metrics_of meander-runtime >"$work/capture.metrics"
  metrics_of meander-operator >"$work/operator.metrics"
  none_holds "$work/capture.metrics"
  none_holds "$work/operator.metrics"
  kubectl get events -A -o json >"$work/events.json"
  k get cdcp trades -o json >"$work/status.json"
  none_holds "$work/events.json"
  none_holds "$work/status.json"
}

# The plan is made of decks, in each of which each kind is once: with as many faults as there are kinds, each comes.
declare -a plan_fault plan_seconds plan_owner plan_title plan_pause
RANDOM=$seed
make_plan() {
  local deck=() i j least most
  for ((i = 0; i < faults; i++)); do
    [ ${#deck[@]} -gt 0 ] || deck=("${kinds[@]}")
    j=$((RANDOM % ${#deck[@]}))
    read -r "plan_fault[i]" least most "plan_owner[i]" "plan_title[i]" <<<"${deck[j]}"
    unset "deck[j]"
    deck=("${deck[@]}")
    plan_seconds[i]=$((least + RANDOM % (most - least + 1)))
    plan_pause[i]=$((RANDOM % 3)).$((RANDOM % 10))
  done
}

# The run as a line of JSON.
report() {
  jq -Rcn --argjson seed "$seed" --argjson seconds "$SECONDS" --argjson changes "$(jq .postgres.changes "$work/verified")" '
    [inputs | split("\t") | {fault: .[0], hold: (.[1] | tonumber), silentMillis: (.[2] | tonumber), statusMillis: (.[3] | tonumber)}]
    | {$seed, faults: length, $seconds, $changes, rounds: .}' "$work/rounds"
}

# table FILE: the reports in it together; of each kind of fault the median and the most, in seconds.
table() {
  jq -rs '"\(length) run(s), \(map(.faults) | add) faults, \(map(.seconds) | add) s, \(map(.changes // 0) | add) changes"' "$1"
  printf '\n%50s %20s\n' "no change for" "status current after"
  printf '%-40s %3s %6s %6s %6s %6s\n' seconds n p50 max p50 max
  jq -rs 'def quantiles: sort | [.[(length - 1) / 2 | floor], .[-1]] | map(. / 1000);
    [.[].rounds[]] | group_by(.fault)[]
    | [.[0].fault, length] + (map(.silentMillis) | quantiles) + (map(.statusMillis) | quantiles) | @tsv' "$1" |
    awk -F '\t' '{ printf "%-40s %3d %6.1f %6.1f %6.1f %6.1f\n", $1, $2, $3, $4, $5, $6 }'
}

if [ "${1:-}" = total ]; then
  table "$2"
  exit
fi
echo "seed $seed, $faults faults: MEANDER_CHAOS_SEED=$seed MEANDER_CHAOS_CLUSTER_FAULTS=$faults $0"
make_plan
begin
promise "an operator and another, a capture and a standby, and load" begin_load
: >"$work/growth"
: >"$work/rounds"
echo '{}' >"$work/verified"
watch_captured &
watch=$!
for ((i = 0; i < faults && status == 0; i++)); do
  held=
  [ "${plan_seconds[i]}" = 0 ] || held=", for ${plan_seconds[i]} s"
  promise "round $((i + 1)): ${plan_title[i]}$held" round "$i"
done
kill "$watch" || true
promise "every committed change is once in Kafka and once in Redis, and one owns the slot" nothing_was_lost
promise "no log, metric, event or status has a password, and nothing panicked" nothing_was_told
report >"$work/report"
table "$work/report"
if [ "$status" = 0 ]; then
  cp "$work/report" "$report"
  echo "$report has the figures"
else
  echo "failed: seed $seed, $faults faults"
fi
