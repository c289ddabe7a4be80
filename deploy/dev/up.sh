#!/usr/bin/env bash
# Puts the development services into a namespace of the cluster of
# tests/cluster/cluster.sh, and waits until they are ready.
#
#   deploy/dev/up.sh [NAMESPACE]      (default: shop)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cluster=$here/../../tests/cluster/cluster.sh
namespace=${1:-shop}
eval "$("$cluster" env)"

# Only a node without a registry needs our stand-ins; what was loaded into this
# cluster before is not loaded again.
if [ "$("$cluster" backend)" = node ]; then
  loaded=$(dirname "$KUBECONFIG")/loaded-dev-images
  touch "$loaded"
  "$here/images/build.sh" | while read -r archive; do
    grep -qxF "$archive" "$loaded" && continue
    "$cluster" load-image "$archive"
    echo "$archive" >>"$loaded"
  done
fi

kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"
kubectl apply -n "$namespace" -f "$here"
for service in postgres redis kafka; do
  kubectl rollout status -n "$namespace" "statefulset/$service" --timeout=180s
done
