{{/* Name of everything that the chart installs: the release's, with `meander` in it once. */}}
{{- define "meander.name" -}}
{{- if contains "meander" .Release.Name -}}
{{- printf "%s-operator" .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-meander-operator" .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The Secret with the certificate of the operator's gRPC port. */}}
{{- define "meander.tlsSecret" -}}
{{- .Values.tls.secretName | default (printf "%s-tls" (include "meander.name" .)) -}}
{{- end -}}

{{- define "meander.selector" -}}
app.kubernetes.io/name: meander-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "meander.labels" -}}
{{ include "meander.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: meander
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image of the registry: a dictionary of `root` and `image`. */}}
{{- define "meander.image" -}}
{{ .root.Values.registry }}/{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{/*
Refuses a release beside another one that looks after the same namespaces: both would write each pipeline's objects in turns, for ever. The cluster is
asked by `helm install` and `helm upgrade` alone, not by `helm template`; of other namespaces only for a release that looks after all of them, since
whoever installs one for a namespace may not be allowed to look further.
*/}}
{{- define "meander.alone" -}}
{{- $ours := .Values.watchNamespace -}}
{{- range (lookup "apps/v1" "Deployment" (empty $ours | ternary "" .Release.Namespace) "").items -}}
{{- $name := printf "%s/%s" .metadata.namespace .metadata.name -}}
{{- if and (eq (dig "metadata" "labels" "app.kubernetes.io/name" "" .) "meander-operator") (ne $name (printf "%s/%s" $.Release.Namespace (include "meander.name" $))) -}}
{{- $theirs := "" -}}
{{- range (first .spec.template.spec.containers).env -}}
{{- if eq .name "WATCH_NAMESPACE" -}}
{{- $theirs = .value -}}
{{- end -}}
{{- end -}}
{{- if or (empty $theirs) (empty $ours) (eq $theirs $ours) -}}
{{- fail (printf "the operator %s looks after %s already: upgrade or uninstall that release, or set watchNamespace of both to namespaces that differ" $name (empty $theirs | ternary "all namespaces" (printf "the namespace %s" $theirs))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What the operator may do with the resources and their objects, in all namespaces or in one. */}}
{{- define "meander.rules" -}}
# The resources it looks after. `update` on finalizers lets its objects block the deletion of their owner.
- apiGroups: [meander.dev]
  resources: [cdcpipelines, replayjobs]
  verbs: [get, list, watch]
# A pipeline gets a finalizer, so that its slot goes with it.
- apiGroups: [meander.dev]
  resources: [cdcpipelines]
  verbs: [patch]
# A finished replay is deleted after its ttlSecondsAfterFinished. What somebody asks of one over gRPC is written to its spec, if they
# may patch it themselves.
- apiGroups: [meander.dev]
  resources: [replayjobs]
  verbs: [patch, delete]
- apiGroups: [meander.dev]
  resources: [cdcpipelines/status, replayjobs/status]
  verbs: [patch]
- apiGroups: [meander.dev]
  resources: [cdcpipelines/finalizers, replayjobs/finalizers]
  verbs: [update]
# The pod that captures; it is watched to tell whether it is available.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# Where a second pod stands by, a drain leaves one of the two.
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
# Who may connect to the pods.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# The pods that replay and clean up; they are watched to tell how they ended.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# What those pods need: their configuration, an identity, and a Service for a replay that serves. They are watched, those alone that carry
# the operator's label, so that nothing need be asked as long as they are as they should be.
- apiGroups: [""]
  resources: [configmaps, serviceaccounts, services]
  verbs: [get, list, watch, create, patch, delete]
# Why a pod does not run, the last word of a replay, and whose pod a caller is.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Whether a Secret that a resource names is there and has its keys. Secrets are never listed or watched.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
# What happened, for kubectl describe.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}
