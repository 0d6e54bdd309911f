{{- define "internvl-operator.labels" -}}
app.kubernetes.io/name: internvl-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: internvl
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "internvl-operator.selector" -}}
app.kubernetes.io/name: internvl-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "internvl-operator.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ $tag }}
{{- end -}}
{{- end }}

{{- define "internvl-operator.rules" -}}
- apiGroups: [serving.internvl.dev]
  resources: [internvldeployments]
  verbs: [list, watch]
- apiGroups: [serving.internvl.dev]
  resources: [internvldeployments/status]
  verbs: [patch]
# Clusters that enforce permissions of owner references want this of whoever blocks a deletion.
- apiGroups: [serving.internvl.dev]
  resources: [internvldeployments/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [list, watch, create]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
