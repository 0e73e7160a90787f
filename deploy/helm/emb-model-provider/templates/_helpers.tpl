{{- define "emb.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "emb.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "emb.labels" -}}
{{ include "emb.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "emb.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "emb.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "emb.claim" -}}
{{- default (include "emb.fullname" .) .Values.persistence.existingClaim -}}
{{- end -}}

{{/* Environment, mounts and security of the service and of the container that pulls. */}}
{{- define "emb.container" -}}
image: {{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
env:
  {{- /* Not auto, because an image with models has values of its own. */}}
  {{- if ne .Values.model.source "auto" }}
  - name: EMB_PROVIDER_MODEL_SOURCE
    value: {{ .Values.model.source | quote }}
  {{- end }}
  {{- if ne .Values.model.precision "auto" }}
  - name: EMB_PROVIDER_MODEL_PRECISION
    value: {{ .Values.model.precision | quote }}
  {{- end }}
  {{- with .Values.model.name }}
  - name: EMB_PROVIDER_MODEL_NAME
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.model.mapping }}
  - name: EMB_PROVIDER_MODEL_MAPPING
    value: {{ toJson . | quote }}
  {{- end }}
  - name: EMB_PROVIDER_SHUTDOWN_GRACE_S
    value: {{ .Values.shutdownGraceSeconds | quote }}
  {{- range $name, $value := .Values.settings }}
  - name: EMB_PROVIDER_{{ $name }}
    value: {{ if kindIs "string" $value }}{{ $value | quote }}{{ else }}{{ toJson $value | quote }}{{ end }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.existingSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
volumeMounts:
  - name: data
    mountPath: /data
  - name: tmp
    mountPath: /tmp
{{- end -}}
