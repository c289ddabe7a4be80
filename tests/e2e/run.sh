#!/usr/bin/env bash
# The main job on a real cluster of its own, and what happens when something is wrong. Every wait is for a condition.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
export MEANDER_CLUSTER=${MEANDER_CLUSTER:-meander-test}
cluster=tests/cluster/cluster.sh
system=meander-system
namespace=shop
status=0

k() { kubectl -n "$namespace" "$@"; }

# promise TITLE COMMAND...: one test.
promise() {
  local title=$1; shift
  if ("$@") >"$work/log" 2>&1; then
    echo "ok - $title"
  else
    echo "not ok - $title"
    sed 's/^/#   /' "$work/log"
    diagnose | sed 's/^/#   /'
    status=1
  fi
}

diagnose() {
  k get cdcp,rpj,jobs,pods -o wide || true
  k get cdcp,rpj -o jsonpath='{range .items[*]}{.kind} {.metadata.name}{range .status.conditions[*]}{"\n  "}{.type}={.status} {.reason}: {.message}{end}{"\n"}{end}' || true
  kubectl -n "$system" logs deployment/meander-operator --tail=30 || true
  k logs -l app.kubernetes.io/managed-by=meander-operator --tail=20 --prefix || true
}

finish() {
  local code=$?
  [ -n "${KEEP:-}" ] || "$cluster" down >/dev/null 2>&1 || true
  rm -rf "$work"
  exit $((code > status ? code : status))
}

# condition KIND/NAME TYPE STATUS [REASON]: waits for it.
condition() {
  local where=$1 type=$2 value=$3 reason=${4:-}
  k wait "$where" --for=jsonpath="{.status.conditions[?(@.type==\"$type\")].status}=$value" --timeout=120s
  [ -z "$reason" ] ||
    k wait "$where" --for=jsonpath="{.status.conditions[?(@.type==\"$type\")].reason}=$reason" --timeout=120s
}

retry() { # TIMES COMMAND...
  local times=$1; shift
  until "$@"; do [ $((times -= 1)) -gt 0 ] || return 1; done
}

run_job() { # FILE NAME
  k delete job "$2" --ignore-not-found --wait
  k apply -f "$1"
  k wait --for=jsonpath='{.status.conditions[?(@.type=="Complete")].status}'=True "job/$2" --timeout=180s ||
    { k logs "job/$2" --tail=50; return 1; }
}

psql_superuser() { k exec -i postgres-0 -- psql -q -v ON_ERROR_STOP=1 -U postgres "$@"; }

install() {
  helm upgrade --install meander charts/meander -n "$system" --create-namespace --wait --timeout 120s
}

pipeline_becomes_ready() {
  k apply -f deploy/examples/pipeline.yaml
  k wait --for=condition=Ready cdcpipeline/trades --timeout=120s
  # After Snapshotting, which the rows that are there take a moment of.
  k wait cdcpipeline/trades --for=jsonpath='{.status.phase}'=Streaming --timeout=60s
}

load_and_verify() {
  run_job deploy/demo/load.yaml load
  run_job deploy/demo/verify.yaml verify
  k logs job/verify
}

status_tells_the_truth() {
  local published
  published=$(k logs job/verify --tail=1 | jq -er .postgres.changes)
  # The operator is told at least every ten seconds.
  k wait cdcpipeline/trades --for=jsonpath='{.status.replication.eventsTotal}'="$published" --timeout=30s
  k get cdcp trades | tail -n 1 | grep -E "True +Streaming +0s +$published"
}

replay_to_receiver() {
  k apply -f deploy/demo/receiver.yaml
  k rollout status deployment/receiver --timeout=60s
  k apply -f deploy/examples/replayjob.yaml
  k wait --for=condition=Complete replayjob/last-seconds --timeout=180s
  local records delivered
  delivered=$(k get rpj last-seconds -o jsonpath='{.status.progress.delivered}')
  k logs deployment/receiver --tail=1
  records=$(k logs deployment/receiver --tail=1 | jq -er 'select(.orderOk and .duplicates == 0) | .records')
  [ "$records" = "$delivered" ] && [ "$delivered" -gt 0 ]
  [ "$(k get rpj last-seconds -o jsonpath='{.status.phase} {.status.progress.percent}')" = "Succeeded 100" ]
}

replay_to_log() {
  k apply -f deploy/examples/replayjob-log.yaml
  k wait --for=condition=Complete replayjob/to-log --timeout=180s
  local lines delivered
  delivered=$(k get rpj to-log -o jsonpath='{.status.progress.delivered}')
  lines=$(k logs -l job-name=to-log-replay --tail=-1 -c replay | grep -c '"commitTime":')
  [ "$lines" = "$delivered" ]
}

replay_to_subscriber() {
  k create secret generic replay-token --from-literal=token=e2e-token
  k apply -f deploy/examples/replayjob-serve.yaml
  k wait pod -l meander.dev/replay=served --for=condition=Ready --timeout=60s
  local address call
  address=$(k get service served-replay -o jsonpath='{.spec.clusterIP}'):50052
  call=("$cluster" exec grpcurl -plaintext -connect-timeout 2)
  # The node's rules for a new service follow a moment after its pod is ready.
  retry 10 "${call[@]}" "$address" list | grep -x meander.v1.Replayer
  if "${call[@]}" "$address" meander.v1.Replayer/ReplayEvent 2>"$work/denied"; then
    echo "a subscriber without a token was served"; return 1
  fi
  grep Unauthenticated "$work/denied"
  "${call[@]}" -H 'authorization: Bearer e2e-token' "$address" meander.v1.Replayer/ReplayEvent >"$work/stream"
  k wait --for=condition=Complete replayjob/served --timeout=60s
  local positions
  positions=$(jq -r '.records[].position' "$work/stream" | wc -l)
  [ "$positions" = "$(k get rpj served -o jsonpath='{.status.progress.delivered}')" ] && [ "$positions" -gt 0 ]
}

capture_pod_is_killed() {
  k get pods -l meander.dev/pipeline=trades -o name | xargs -r kubectl -n "$namespace" delete --grace-period=0 --force
  load_and_verify
  condition cdcpipeline/trades Ready True
}

missing_secret() {
  k get secret shop-cdc -o json | jq 'del(.metadata.uid, .metadata.resourceVersion, .metadata.creationTimestamp)' >"$work/secret"
  sed 's/name: shop-cdc/name: not-there/' deploy/examples/pipeline.yaml | sed 's/name: trades/name: broken/; s/Prefix: shop/Prefix: broken/' | k apply -f -
  condition cdcpipeline/broken Ready False SecretNotFound
  jq '.metadata.name = "not-there"' "$work/secret" | k apply -f -
  condition cdcpipeline/broken Ready True
}

wrong_password() {
  jq '.metadata.name = "not-there" | .data.password = ("wrong" | @base64)' "$work/secret" | k apply -f -
  k delete pods -l meander.dev/pipeline=broken --wait
  condition cdcpipeline/broken SourceReady False AuthenticationFailed
  condition cdcpipeline/broken Ready False
  jq '.metadata.name = "not-there"' "$work/secret" | k apply -f -
  condition cdcpipeline/broken Ready True
}

unreachable_database() {
  k patch cdcp broken --type=merge -p '{"spec":{"source":{"postgres":{"port":5439}}}}'
  condition cdcpipeline/broken SourceReady False DatabaseUnreachable
  k patch cdcp broken --type=merge -p '{"spec":{"source":{"postgres":{"port":5432}}}}'
  condition cdcpipeline/broken Ready True
}

# PostgreSQL does not start with a logical slot and wal_level replica, so this takes a server of its own, made from the first
# one's manifest.
wal_level_replica() {
  k get statefulset,service postgres -o json |
    jq '.items[] |= (.metadata = {name: "replica", labels: {app: "replica"}} | del(.status, .spec.clusterIP, .spec.clusterIPs)
      | if .kind == "Service" then .spec.selector = {app: "replica"} else
          .spec.serviceName = "replica" | .spec.selector.matchLabels = {app: "replica"}
          | .spec.template.metadata.labels = {app: "replica"}
          | .spec.template.spec.containers[0].args = (.spec.template.spec.containers[0].args | map(sub("wal_level=logical"; "wal_level=replica"))) end)' |
    k apply -f -
  k rollout status statefulset/replica --timeout=120s
  sed 's/host: postgres/host: replica/; s/name: trades/name: replica/; s/Prefix: shop/Prefix: replica/' deploy/examples/pipeline.yaml | k apply -f -
  condition cdcpipeline/replica SourceReady False WalLevelNotLogical
  k get statefulset replica -o json | jq '.spec.template.spec.containers[0].args |= map(sub("wal_level=replica"; "wal_level=logical"))' | k apply -f -
  k rollout status statefulset/replica --timeout=120s
  condition cdcpipeline/replica Ready True
}

kafka_is_down() {
  k scale statefulset/kafka --replicas=0
  k delete pods -l meander.dev/pipeline=broken --wait
  condition cdcpipeline/broken SinksReady False KafkaUnreachable
  k scale statefulset/kafka --replicas=1
  k rollout status statefulset/kafka --timeout=180s
  condition cdcpipeline/broken Ready True
  condition cdcpipeline/trades Ready True
}

refused_spec() {
  if sed 's/bootstrapServers: \["kafka:9092"\]/bootstrapServers: []/' deploy/examples/pipeline.yaml | k apply --dry-run=server -f -; then
    echo "a pipeline without Kafka servers was accepted"; return 1
  fi
  if k patch cdcp trades --type=merge -p '{"spec":{"source":{"postgres":{"database":"other"}}}}'; then
    echo "the database was changed"; return 1
  fi
}

deletion_drops_the_slot() {
  k delete cdcp broken --wait --timeout=120s
  [ "$(psql_superuser -At -c "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE '%broken%'")" = 0 ]
  [ "$(k get deploy,cm,sa -l meander.dev/pipeline=broken -o name | wc -l)" = 0 ]
}

still_in_agreement() {
  load_and_verify
}

work=$(mktemp -d)
trap finish EXIT
make -s images >"$work/images"
"$cluster" up
eval "$("$cluster" env)"
deploy/dev/up.sh "$namespace"
while read -r image; do "$cluster" load-image "$image"; done <"$work/images"

promise "the chart installs" install
promise "a pipeline becomes Ready" pipeline_becomes_ready
promise "every committed change is once in Kafka and once in Redis" load_and_verify
promise "kubectl get shows phase, lag and events as they are" status_tells_the_truth
promise "a replay delivers each change once and in commit order to a receiver" replay_to_receiver
promise "a replay goes into its own log" replay_to_log
promise "a replay is served to a subscriber with a token, and to nobody else" replay_to_subscriber
promise "a killed capture pod loses and doubles nothing" capture_pod_is_killed
promise "a missing Secret is said, and heals" missing_secret
promise "a wrong password is said, and heals" wrong_password
promise "an unreachable database is said, and heals" unreachable_database
promise "a database without wal_level logical is said, and heals" wal_level_replica
promise "a Kafka that is down is said, and heals" kafka_is_down
promise "a spec that can never work is refused" refused_spec
promise "deleting a pipeline drops its slot and its objects" deletion_drops_the_slot
promise "after all this, the stores still agree" still_in_agreement
