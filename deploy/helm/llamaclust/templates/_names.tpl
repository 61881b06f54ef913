{{- define "llamaclust.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* What all names begin with. Short enough that pods' names, which are workers' names, stay under 63. */}}
{{- define "llamaclust.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "llamaclust.name" .) .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (include "llamaclust.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "llamaclust.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "llamaclust.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{/* The lock of several coordinators; empty for one. */}}
{{- define "llamaclust.lease" -}}
{{- if gt (int .Values.coordinator.replicas) 1 }}{{ include "llamaclust.fullname" . }}-coordinator{{ end }}
{{- end }}

{{- define "llamaclust.joinSecret" -}}
{{ .Values.joinToken.existingSecret | default (printf "%s-join" (include "llamaclust.fullname" .)) }}
{{- end }}

{{- define "llamaclust.authoritySecret" -}}
{{ .Values.certificateAuthority.existingSecret | default (printf "%s-authority" (include "llamaclust.fullname" .)) }}
{{- end }}

{{- define "llamaclust.keysSecret" -}}
{{ .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "llamaclust.fullname" .)) }}
{{- end }}

{{/* How clients speak to the API's port. */}}
{{- define "llamaclust.apiScheme" -}}
http{{ if .Values.tls.existingSecret }}s{{ end }}
{{- end }}

{{/* What selectors match; never changes over upgrades. */}}
{{- define "llamaclust.selector" -}}
app.kubernetes.io/name: {{ include "llamaclust.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "llamaclust.labels" -}}
{{ include "llamaclust.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "llamaclust.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else }}{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* The port of gRPC with mutual TLS, which enrolment returns. */}}
{{- define "llamaclust.controlPort" -}}
{{ add1 .Values.coordinator.ports.join }}
{{- end }}
