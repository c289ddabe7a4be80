#!/usr/bin/env bash
# The main job on a real cluster of its own, and what happens when something is wrong. Every wait is for a condition.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
export MEANDER_CLUSTER=${MEANDER_CLUSTER:-meander-test}
# shellcheck source=tests/e2e/lib.sh
. tests/e2e/lib.sh

psql_superuser() { k exec -i postgres-0 -- psql -q -v ON_ERROR_STOP=1 -U postgres "$@"; }

load_and_verify() {
  date -u +%Y-%m-%dT%H:%M:%SZ >"$work/loaded"
  run_job deploy/demo/load.yaml load
  run_job deploy/demo/verify.yaml verify
  k logs job/verify
}

status_tells_the_truth() {
  local published
  published=$(k logs job/verify --tail=1 | jq -er .postgres.changes)
  # The operator is told at least every ten seconds.
  k wait cdcpipeline/trades --for=jsonpath='{.status.replication.eventsTotal}'="$published" --timeout=240s
  k get cdcp trades | tail -n 1 | grep -E "True +Streaming +0s +$published"
}

replay_to_receiver() {
  k apply -f deploy/demo/receiver.yaml
  k rollout status deployment/receiver --timeout=240s
  k apply -f deploy/examples/replayjob.yaml
  k wait --for=condition=Complete replayjob/last-seconds --timeout=240s
  local records delivered
  delivered=$(k get rpj last-seconds -o jsonpath='{.status.progress.delivered}')
  k logs deployment/receiver --tail=1
  records=$(k logs deployment/receiver --tail=1 | jq -er 'select(.orderOk and .duplicates == 0) | .records')
  [ "$records" = "$delivered" ]
  [ "$delivered" -gt 0 ]
  [ "$(k get rpj last-seconds -o jsonpath='{.status.phase} {.status.progress.percent}')" = "Succeeded 100" ]
}

replay_to_log() {
  k apply -f deploy/examples/replayjob-log.yaml
  k wait --for=condition=Complete replayjob/to-log --timeout=240s
  local lines delivered
  delivered=$(k get rpj to-log -o jsonpath='{.status.progress.delivered}')
  lines=$(k logs -l job-name=to-log-replay --tail=-1 -c replay | grep -c '"commitTime":')
  [ "$lines" = "$delivered" ]
}

replay_to_subscriber() {
  k create secret generic replay-token --from-literal=token=e2e-token
  k apply -f deploy/examples/replayjob-serve.yaml
  k wait pod -l meander.dev/replay=served --for=condition=Ready --timeout=240s
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
  k wait --for=condition=Complete replayjob/served --timeout=240s
  local coordinates
  coordinates=$(jq -c '.records[].coordinate' "$work/stream" | wc -l)
  [ "$coordinates" = "$(k get rpj served -o jsonpath='{.status.progress.delivered}')" ] && [ "$coordinates" -gt 0 ]
}

# A caller of the operator that may read and patch ReplayJobs.
operator_calls() { # METHOD MESSAGE
  "$cluster" exec grpcurl -cacert "$work/operator-ca.crt" -connect-timeout 2 -H "authorization: Bearer $token" -d "$2" \
    meander-operator.$system.svc:50051 "meander.v1.ProgressTracker/$1"
}

# seen FILTER: waits until a report of the replay that is followed is so, and prints the first one that is.
seen() {
  jq -ecn --unbuffered "first(inputs | select($1))" < <(timeout 240 tail -n +1 -f "$work/progress")
}

# Milliseconds from $1 until the pod said that it does what was asked; a generous bound, the figure is what counts.
acted() { # SINCE WHAT FILTER
  local at
  at=$(seen "$3" | jq -r .timeMicros)
  note "$2 took $(((at - $1) / 1000)) ms"
  [ $(((at - $1) / 1000)) -lt 5000 ]
}

# The speed at which event time passes, over the reports that a filter takes.
speed_over() {
  jq -rn "[inputs | select($1) | {now: .timeMicros | tonumber, event: .replay.currentTimeMicros | tonumber}]
    | (last.event - first.event) / (last.now - first.now)" "$work/progress"
}

replay_is_driven() {
  k create serviceaccount ops
  k create role replay-ops --verb=get,patch --resource=replayjobs.meander.dev
  k create rolebinding replay-ops --role=replay-ops --serviceaccount="$namespace:ops"
  local token since replay follow paused speed
  token=$(k create token ops --audience=meander.dev)
  k get configmap trades-capture -o jsonpath='{.data.operator-ca\.crt}' >"$work/operator-ca.crt"
  replay='"namespace": "shop", "name": "driven"'
  sed "s/name: to-log/name: driven/; s/speed: max/speed: \"0.2\"/; s/from: .*/from: {time: \"$(cat "$work/loaded")\"}/" \
    deploy/examples/replayjob-log.yaml | k apply -f -
  k wait replayjob/driven --for=jsonpath='{.status.phase}'=Running --timeout=240s
  operator_calls StreamProgress "{\"resource\": {\"kind\": \"ReplayJob\", $replay}}" >"$work/progress" &
  follow=$!
  # In the middle of its delivery: what has delivered nothing yet has no event time to measure a speed by.
  seen '(.replay.delivered // "0" | tonumber) > 0'

  since=$(micros)
  operator_calls ControlReplay "{$replay, \"suspend\": true}"
  acted "$since" "a pause over gRPC" '.replay.phase == "PHASE_PAUSED"'
  k wait replayjob/driven --for=jsonpath='{.status.phase}'=Paused --timeout=240s
  # Nothing is delivered meanwhile: two reports later, it is where it was.
  paused=$(seen '.replay.phase == "PHASE_PAUSED"' | jq -r .timeMicros)
  seen ".replay.phase == \"PHASE_PAUSED\" and (.timeMicros | tonumber) > $paused + 2000000"
  [ "$(jq -rn '[inputs | select(.replay.phase == "PHASE_PAUSED") | .replay.delivered] | unique | length' "$work/progress")" = 1 ]

  since=$(micros)
  k patch rpj driven --type=merge -p '{"spec": {"suspend": false, "speed": 2}}'
  acted "$since" "going on, twice as fast, by kubectl patch" ".replay.phase == \"PHASE_RUNNING\" and (.timeMicros | tonumber) > $since"
  seen ".replay.phase == \"PHASE_RUNNING\" and (.timeMicros | tonumber) > $since + 3000000"
  speed=$(speed_over ".replay.phase == \"PHASE_RUNNING\" and (.timeMicros | tonumber) > $since")
  note "it went on at ${speed:0:4} times the original pace"
  jq -en "$speed > 1 and $speed < 4"

  since=$(micros)
  operator_calls ControlReplay "{$replay, \"cancel\": true}"
  acted "$since" "a cancel over gRPC" '.replay.phase == "PHASE_CANCELLED"'
  k wait replayjob/driven --for=jsonpath='{.status.phase}'=Cancelled --timeout=240s
  # The stream ends with the replay, and a replay that has ended takes no orders.
  wait "$follow"
  if operator_calls ControlReplay "{$replay, \"suspend\": false}" 2>"$work/denied"; then
    echo "a replay that had ended was controlled"; return 1
  fi
  grep FailedPrecondition "$work/denied"
}

# Its pod hears of it before Kubernetes ends the pod.
deletion_stops_a_replay() {
  local since last ended followed
  sed "s/name: to-log/name: unwanted/; s/speed: max/speed: \"0.2\"/; s/from: .*/from: {time: \"$(cat "$work/loaded")\"}/" \
    deploy/examples/replayjob-log.yaml | k apply -f -
  k wait replayjob/unwanted --for=jsonpath='{.status.phase}'=Running --timeout=240s
  # The runtime reports to the operator before the node reports its container, whose log can only be read after that.
  k wait pod -l meander.dev/replay=unwanted --for=condition=Ready --timeout=240s
  : >"$work/unwanted"
  k logs -f job/unwanted-replay >>"$work/unwanted" &
  followed=$!
  # Once it is followed; afterwards there is nothing to follow any more.
  grep -m 1 . < <(timeout 240 tail -n +1 -f "$work/unwanted")
  since=$(micros)
  k delete replayjob unwanted --wait
  wait "$followed"
  last=$(jq -Rc 'fromjson? | objects | select(.message == "the replay ended")' "$work/unwanted")
  ended=$(date -d "$(jq -r .timestamp <<<"$last")" +%s%6N)
  note "it ended after $(((ended - since) / 1000)) ms, as $(jq -r .reason <<<"$last")"
  [ $(((ended - since) / 1000)) -lt 5000 ]
}

# Into one receiver, while the operator is killed.
twenty_replays_at_once() {
  local i start=$SECONDS
  for i in $(seq 20); do
    echo ---
    sed "s/name: last-seconds/name: twenty-$i\n  labels: {test: twenty}/; s/speed: 10/speed: max/" deploy/examples/replayjob.yaml
  done | k apply -f -
  k wait replayjob/twenty-1 --for=jsonpath='{.status.startTime}' --timeout=240s
  kubectl -n "$system" delete pods -l app.kubernetes.io/name=meander-operator --grace-period=0 --force
  k wait replayjobs -l test=twenty --for=condition=Complete --timeout=240s
  note "all were done after $((SECONDS - start)) s"
  k get rpj -l test=twenty -o json | jq -e '[.items[] | .status.phase + " " + (.status.progress.delivered | tostring)]
    | length == 20 and (unique | length) == 1 and (.[0] | test("^Succeeded [1-9]"))'
  # Each stream was one of them, whole, in order and without a double, or the first part of one whose pod was replaced.
  k logs deployment/receiver --tail=-1 | jq -Rcn '[inputs | fromjson? | objects] | .[-20:]' >"$work/streams"
  jq -e --argjson delivered "$(k get rpj twenty-1 -o jsonpath='{.status.progress.delivered}')" \
    'length == 20 and all(.orderOk and .records == $delivered)' "$work/streams"
  k delete replayjobs -l test=twenty --wait
}

# Nobody delivers for ever to a receiver that is not there.
replay_has_a_deadline() {
  sed 's/name: last-seconds/name: hopeless/; s/receiver:50051/nobody:50051/; s/speed: 10/speed: max\n  activeDeadlineSeconds: 5/' \
    deploy/examples/replayjob.yaml | k apply -f -
  condition replayjob/hopeless Failed True DeadlineExceeded
  k get rpj hopeless -o wide | grep -E "trades +Failed .* DeadlineExceeded "
}

capture_pod_is_killed() {
  k get pods -l meander.dev/pipeline=trades -o name | xargs -r kubectl -n "$namespace" delete --grace-period=0 --force
  load_and_verify
  condition cdcpipeline/trades Ready True
}

# In the middle of a load, as the loss of its node would.
standby_takes_over() {
  local token since follow first second went_on generation
  token=$(k create token ops --audience=meander.dev)
  k create role pipeline-watch --verb=get --resource=cdcpipelines.meander.dev
  k create rolebinding pipeline-watch --role=pipeline-watch --serviceaccount="$namespace:ops"
  add_standby
  [ "$(k get pdb trades-capture -o jsonpath='{.spec.minAvailable}')" = 1 ]
  # The new pods may still be handing the slot from one to the other.
  retry 100 one_owner
  first=$(cat "$work/owner")

  : >"$work/progress"
  operator_calls StreamProgress '{"resource": {"kind": "CdcPipeline", "namespace": "shop", "name": "trades"}}' >"$work/progress" &
  follow=$!
  generation=$(seen '.capture.ownerGeneration' | jq -r .capture.ownerGeneration)
  k delete job load --ignore-not-found --wait
  k apply -f deploy/demo/load.yaml
  since=$(seen '.capture.eventsTotal' | jq -r .capture.eventsTotal)
  seen "(.capture.eventsTotal // \"0\" | tonumber) > $since"
  since=$(micros)
  k delete pod "$first" --grace-period=0 --force
  went_on=$(seen "(.capture.ownerGeneration // \"0\" | tonumber) > $generation
    and (.capture.lastEventTimeMicros // \"0\" | tonumber) > $since" | jq -r .timeMicros)
  note "changes went on $(((went_on - since) / 1000)) ms after the pod was killed"
  [ $(((went_on - since) / 1000)) -lt 15000 ]
  retry 100 one_owner
  second=$(cat "$work/owner")
  [ "$second" != "$first" ]
  kill "$follow"
  k wait --for=condition=Complete job/load --timeout=240s
  run_job deploy/demo/verify.yaml verify
  k rollout status deployment/trades-capture --timeout=240s
  condition cdcpipeline/trades Ready True
}

# disturbed WHAT COMMAND...: runs it while changes come, until one was published afterwards, and says for how long there was none. A generous
# bound, since everything else runs on the same machine; the figure is what counts.
disturbed() {
  local what=$1 since over pause; shift
  since=$(micros)
  "$@"
  over=$(micros)
  flows_again "$over"
  pause=$(silence "$since")
  note "$what: no change was published for $pause ms at the most (goal: 5000)"
  [ "$pause" -lt 15000 ]
}

capture_runs() { # TAG: the pods that capture have the image of this tag
  k wait deployment/trades-capture --timeout=240s \
    --for=jsonpath='{.spec.template.spec.containers[0].image}'="ghcr.io/meander-dev/meander-runtime:$1"
  k rollout status deployment/trades-capture --timeout=240s
}

upgrade() {
  helm upgrade meander charts/meander -n "$system" --set image.tag=next,runtime.image.tag=next --wait --timeout 240s
  capture_runs next
}

rollback() {
  helm rollback meander -n "$system" --wait --timeout 240s
  capture_runs dev
}

# Resources and captures stay, and an operator that comes back takes them over.
remove_and_install() {
  helm uninstall meander -n "$system" --wait --timeout 240s
  k get cdcpipeline/trades deployment/trades-capture configmap/trades-capture
  install
  k wait cdcpipeline/trades --for=jsonpath='{.status.phase}'=Streaming --timeout=240s
}

kill_leader_and_owner() {
  local first
  retry 100 one_owner
  first=$(cat "$work/owner")
  kubectl -n "$system" delete pods -l app.kubernetes.io/name=meander-operator --grace-period=0 --force
  k delete pod "$first" --grace-period=0 --force
  retry 100 one_owner
  [ "$(cat "$work/owner")" != "$first" ]
}

# Nobody is told that its connections are gone, and once it has a network again it goes on with what it had in hand.
cut_off_owner() {
  local first address
  retry 100 one_owner
  first=$(cat "$work/owner")
  address=$(k get pod "$first" -o jsonpath='{.status.podIP}')
  network -I "$address"
  retry 100 one_owner
  [ "$(cat "$work/owner")" != "$first" ]
  network -D "$address"
  k wait pod "$first" --for=condition=Ready --timeout=240s
  retry 100 one_owner
  [ "$(cat "$work/owner")" != "$first" ]
}

# Who stands by has read it, and whoever comes next needs it.
delete_secret_and_kill_owner() {
  local first
  k get secret shop-cdc -o json | jq 'del(.metadata.uid, .metadata.resourceVersion, .metadata.creationTimestamp)' >"$work/secret"
  k delete secret shop-cdc
  retry 100 one_owner
  first=$(cat "$work/owner")
  k delete pod "$first" --grace-period=0 --force
  retry 100 one_owner
  [ "$(cat "$work/owner")" != "$first" ]
  condition cdcpipeline/trades Ready False SecretNotFound
  k apply -f "$work/secret"
  k rollout status deployment/trades-capture --timeout=240s
  condition cdcpipeline/trades Ready True
}

# With a pod that stands by, from the promise before.
replaced_under_load() {
  local image
  # Another tag of the same images: to the operator and to Helm an upgrade like any other.
  for image in operator runtime; do
    "$cluster" node ctr -n k8s.io images tag --force "ghcr.io/meander-dev/meander-$image:dev" "ghcr.io/meander-dev/meander-$image:next"
  done
  load_for_long
  : >"$work/growth"
  watch_captured &
  # Not local: the trap is run when the function is over.
  watch=$!
  trap 'kill "$watch" 2>/dev/null || true' EXIT
  disturbed "while nothing was done" k wait --for=jsonpath='{.status.ready}'=1 job/load --timeout=240s
  disturbed "helm upgrade" upgrade
  disturbed "helm rollback" rollback
  disturbed "helm uninstall, helm install" remove_and_install
  disturbed "leader and capture pod killed" kill_leader_and_owner
  disturbed "network of the capture pod cut" cut_off_owner
  disturbed "Secret deleted, capture pod killed" delete_secret_and_kill_owner
  kill "$watch"
  k delete job load --cascade=foreground --wait
  k rollout status deployment/trades-capture --timeout=240s
  run_job deploy/demo/verify.yaml verify
  condition cdcpipeline/trades Ready True
}

missing_secret() {
  k get secret shop-cdc -o json | jq 'del(.metadata.uid, .metadata.resourceVersion, .metadata.creationTimestamp)' >"$work/secret"
  sed 's/name: shop-cdc/name: not-there/' deploy/examples/pipeline.yaml | sed 's/name: trades/name: broken/; s/Prefix: shop/Prefix: broken/' | k apply -f -
  condition cdcpipeline/broken Ready False SecretNotFound
  jq '.metadata.name = "not-there"' "$work/secret" | k apply -f -
  condition cdcpipeline/broken Ready True
  # One that captures goes on with what it has, until a pod has to be made.
  k delete secret not-there
  [ "$(k get deployment broken-capture -o jsonpath='{.status.readyReplicas}')" = 1 ]
  condition cdcpipeline/broken Ready True
  k delete pods -l meander.dev/pipeline=broken --wait
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
  k rollout status statefulset/replica --timeout=240s
  sed 's/host: postgres/host: replica/; s/name: trades/name: replica/; s/Prefix: shop/Prefix: replica/' deploy/examples/pipeline.yaml | k apply -f -
  condition cdcpipeline/replica SourceReady False WalLevelNotLogical
  k get statefulset replica -o json | jq '.spec.template.spec.containers[0].args |= map(sub("wal_level=replica"; "wal_level=logical"))' | k apply -f -
  k rollout status statefulset/replica --timeout=240s
  condition cdcpipeline/replica Ready True
}

kafka_is_down() {
  k scale statefulset/kafka --replicas=0
  k delete pods -l meander.dev/pipeline=broken --wait
  condition cdcpipeline/broken SinksReady False KafkaUnreachable
  k scale statefulset/kafka --replicas=1
  k rollout status statefulset/kafka --timeout=240s
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

# A replay of a suspended pipeline begins, waits for its receiver, and goes on when the pipeline is gone.
replay_outlives_its_pipeline() {
  k patch cdcp broken --type=merge -p '{"spec": {"suspend": true}}'
  sed 's/name: last-seconds/name: heir/; s/name: trades/name: broken/; s/receiver:50051/late:50051/; s/speed: 10/speed: max/' \
    deploy/examples/replayjob.yaml | k apply -f -
  k wait pod -l meander.dev/replay=heir --for=condition=Ready --timeout=240s
  deletion_drops_the_slot
  [ "$(k get rpj heir -o jsonpath='{.status.phase}')" = Pending ]
  k get service receiver -o json | jq 'del(.spec.clusterIP, .spec.clusterIPs) | .metadata = {name: "late"}' | k apply -f -
  k wait --for=condition=Complete replayjob/heir --timeout=240s
  [ "$(k get rpj heir -o jsonpath='{.status.progress.delivered}')" -gt 0 ]
}

deletion_drops_the_slot() {
  k delete cdcp broken --wait --timeout=240s
  [ "$(psql_superuser -At -c "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE '%broken%'")" = 0 ]
  [ "$(k get deploy,cm,sa -l meander.dev/pipeline=broken -o name | wc -l)" = 0 ]
}

still_in_agreement() {
  load_and_verify
}

begin

promise "the chart installs, and its test passes" install
promise "a pipeline becomes Ready" pipeline_becomes_ready
promise "every committed change is once in Kafka and once in Redis" load_and_verify
promise "kubectl get shows phase, lag and events as they are" status_tells_the_truth
promise "a replay delivers each change once and in commit order to a receiver" replay_to_receiver
promise "a replay goes into its own log" replay_to_log
promise "a replay is served to a subscriber with a token, and to nobody else" replay_to_subscriber
promise "a replay is held, paced and ended while it runs" replay_is_driven
promise "a replay that is deleted ends at once" deletion_stops_a_replay
promise "twenty replays of one pipeline run at once, through a crash of the operator" twenty_replays_at_once
promise "a replay that takes too long is ended, and says so" replay_has_a_deadline
promise "a killed capture pod loses and doubles nothing" capture_pod_is_killed
promise "a pod that stands by takes over from one that is killed, with nothing lost or doubled" standby_takes_over
promise "upgraded, rolled back, removed, installed again, killed, cut off and without its Secret under load, it loses and doubles nothing" replaced_under_load
promise "a missing Secret is said, and heals" missing_secret
promise "a wrong password is said, and heals" wrong_password
promise "an unreachable database is said, and heals" unreachable_database
promise "a database without wal_level logical is said, and heals" wal_level_replica
promise "a Kafka that is down is said, and heals" kafka_is_down
promise "a spec that can never work is refused" refused_spec
promise "deleting a pipeline drops its slot and its objects, and its replay goes on" replay_outlives_its_pipeline
promise "after all this, the stores still agree" still_in_agreement
