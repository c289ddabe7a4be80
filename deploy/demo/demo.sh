#!/usr/bin/env bash
# The whole of Meander on a cluster of its own: captures 10,000 changes of a PostgreSQL table into Kafka and Redis, compares all
# three, and replays the last seconds ten times as fast into a receiver. `make demo-down` takes it all away.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
namespace=shop
system=meander-system
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { sed 's/^/    /'; }

# step TITLE COMMAND...: runs it and says how long it took. The end of its output is shown if it fails.
step() {
  local title=$1 start=$SECONDS log=$logs/step.log; shift
  printf '%-58s' "$title"
  if "$@" >"$log" 2>&1; then
    printf '%5d s\n' $((SECONDS - start))
  else
    printf ' FAILED after %d s\n' $((SECONDS - start))
    echo "  command: $*"
    tail -n 40 "$log" | show
    explain
    exit 1
  fi
}

# What matters when something on the cluster went wrong.
explain() {
  command -v kubectl >/dev/null && kubectl get namespace "$namespace" >/dev/null 2>&1 || return 0
  echo "  the resources:"
  kubectl -n "$namespace" get cdcp,rpj,pods -o wide 2>&1 | show
  kubectl -n "$namespace" get cdcp,rpj -o jsonpath='{range .items[*]}{.metadata.name}{range .status.conditions[*]}{"\n  "}{.type}={.status} {.reason}: {.message}{end}{"\n"}{end}' 2>&1 | show
  echo "  the operator:"
  kubectl -n "$system" logs deployment/meander-operator --tail=15 2>&1 | show
  echo "  the capture:"
  kubectl -n "$namespace" logs -l meander.dev/pipeline=trades --tail=15 2>&1 | show
}

job() { # NAME: applies and waits for the end of a job, whichever it is
  kubectl -n "$namespace" delete job "$1" --ignore-not-found --wait >/dev/null
  kubectl -n "$namespace" apply -f "deploy/demo/$1.yaml"
  kubectl -n "$namespace" wait --for=jsonpath='{.status.conditions[?(@.type=="Complete")].status}'=True "job/$1" --timeout=180s ||
    { kubectl -n "$namespace" logs "job/$1" --tail=40; return 1; }
}

install_chart() {
  helm upgrade --install meander charts/meander -n "$system" --create-namespace --wait --timeout 120s
  # The image keeps its tag from build to build.
  kubectl -n "$system" rollout restart deployment/meander-operator
  kubectl -n "$system" rollout status deployment/meander-operator --timeout=120s
}

load_images() {
  local line
  while read -r line; do tests/cluster/cluster.sh load-image "$line"; done <"$logs/images"
}

build_images() { make -s images >"$logs/images"; }

apply_pipeline() {
  kubectl -n "$namespace" apply -f deploy/examples/pipeline.yaml
  kubectl -n "$namespace" wait --for=condition=Ready cdcpipeline/trades --timeout=120s
}

say "1. What it runs on"
step "Install what is missing" tests/setup.sh base rust cluster
step "Build the images (operator, runtime, demo)" build_images
step "Start the cluster" tests/cluster/cluster.sh up
eval "$(tests/cluster/cluster.sh env)"
step "Start PostgreSQL, Redis and Kafka in namespace $namespace" deploy/dev/up.sh "$namespace"
step "Load the images into the cluster" load_images

say "2. Meander"
step "helm install meander charts/meander" install_chart
step "kubectl apply -f deploy/examples/pipeline.yaml, until Ready" apply_pipeline
kubectl -n "$namespace" get cdcp trades | show

say "3. A load of 10,000 changes, and what became of it"
from=$(date -u +%Y-%m-%dT%H:%M:%SZ)
step "Insert, update and delete, 500 changes a second" job load
kubectl -n "$namespace" logs job/load --tail=1 | show
step "Compare PostgreSQL, Kafka and Redis, change by change" job verify
kubectl -n "$namespace" logs job/verify | sed '$d' | show
kubectl -n "$namespace" get cdcp trades -o wide | show

say "4. Replay of these seconds, ten times as fast, into a gRPC receiver"
kubectl -n "$namespace" delete rpj last-seconds --ignore-not-found --wait >/dev/null
step "Start a receiver" bash -c "kubectl -n $namespace apply -f deploy/demo/receiver.yaml && kubectl -n $namespace rollout restart deployment/receiver && kubectl -n $namespace rollout status deployment/receiver --timeout=60s"
sed "s/from: {at: Beginning}/from: {time: \"$from\"}/" deploy/examples/replayjob.yaml | kubectl -n "$namespace" apply -f - | show
kubectl -n "$namespace" get rpj last-seconds --watch >"$logs/watch" 2>&1 &
watch=$!
step "Until it is complete" kubectl -n "$namespace" wait --for=condition=Complete replayjob/last-seconds --timeout=120s
kill "$watch" 2>/dev/null || true
show <"$logs/watch"
received=$(kubectl -n "$namespace" logs deployment/receiver --tail=1)

say "5. Summary after $((SECONDS - started)) s"
kubectl -n "$namespace" logs job/verify --tail=1 |
  jq -r '"PostgreSQL, Kafka and Redis agree on \(.postgres.changes) changes of \(.postgres.keys) rows."' | show
jq -r '"The replay delivered \(.records) records, \(if .orderOk and .duplicates == 0 then "each once and in commit order" else "NOT in order" end):",
  "\(.commitSpanSeconds * 1000 | round / 1000) s of history in \(.wallSeconds * 1000 | round / 1000) s, \(.ratio * 100 | round / 100) times as fast as it happened."' <<<"$received" | show
jq -e '.orderOk and .duplicates == 0' <<<"$received" >/dev/null
cat <<TEXT

What to try next:
    eval "\$(tests/cluster/cluster.sh env)"; kubectl config set-context --current --namespace=$namespace
    kubectl get cdcp,rpj
    kubectl describe cdcp trades
    kubectl exec postgres-0 -- psql -U postgres shop -c "UPDATE trades SET price = price * 2 WHERE symbol = 'ACME'"
    kubectl exec redis-0 -- redis-cli XREVRANGE shop.public.trades + - COUNT 1
    kubectl exec kafka-0 -- /opt/kafka/bin/kafka-console-consumer.sh --bootstrap-server kafka:9092 --topic shop.public.trades \\
        --isolation-level read_committed --from-beginning --max-messages 3 --formatter-property print.headers=true
    kubectl apply -f deploy/examples/replayjob-log.yaml
    make demo-down
TEXT
