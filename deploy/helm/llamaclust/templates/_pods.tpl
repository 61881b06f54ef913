{{/* What holds for every pod. */}}
{{- define "llamaclust.podSecurity" -}}
serviceAccountName: {{ include "llamaclust.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- with .Values.security.user }}
  runAsUser: {{ . }}
  runAsGroup: {{ . }}
  fsGroup: {{ . }}
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* What holds for every container. */}}
{{- define "llamaclust.container" -}}
image: {{ include "llamaclust.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "llamaclust.folders" -}}
- {name: HOME, value: /tmp}
- {name: LLAMACLUST_HOME, value: /var/lib/llamaclust}
- {name: LLAMACLUST_STATE_DIR, value: /var/lib/llamaclust/state}
- {name: LLAMACLUST_LOG, value: {{ .Values.logFormat }}}
{{- end }}

{{- define "llamaclust.bytes" -}}
{{- $unit := regexFind "[KMGTPE]i?$" . }}
{{- $bytes := trimSuffix $unit . | trim | float64 }}
{{- range until (get (dict "K" 1 "M" 2 "G" 3 "T" 4 "P" 5 "E" 6) (trimSuffix "i" $unit) | default 0 | int) }}
{{- $bytes = mulf $bytes (ternary 1024 1000 (hasSuffix "i" $unit)) }}
{{- end }}
{{- int64 $bytes }}
{{- end }}

{{/* Of a main container: of the node's disk it takes /tmp, and its data where these go with the pod. */}}
{{- define "llamaclust.resources" -}}
{{- $disk := include "llamaclust.bytes" .tmpSize | int64 }}
{{- if not .own.persistence.enabled }}
{{- $disk = add $disk (include "llamaclust.bytes" .own.persistence.size | int64) }}
{{- end }}
{{- $resources := deepCopy .own.resources }}
{{- range list "requests" "limits" }}
{{- $_ := set $resources . (merge (get $resources . | default dict) (dict "ephemeral-storage" (toString $disk))) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* The pod's own volume, and the model's where that is another one. */}}
{{- define "llamaclust.dataMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: data, mountPath: /var/lib/llamaclust}
{{- if ne .Values.model.volume.kind "perPod" }}
- name: models
  mountPath: /var/lib/llamaclust/models
  readOnly: true
{{- end }}
{{- end }}

{{- define "llamaclust.sharedVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.tmpSize }}}
{{- with .Values.model.volume }}
{{- if eq .kind "hostPath" }}
- name: models
  hostPath: {path: {{ required "model.volume.hostPath: which folder of the nodes?" .hostPath }}, type: Directory}
{{- else if ne .kind "perPod" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "llamaclust.modelClaim" $ }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llamaclust.modelClaim" -}}
{{- if eq .Values.model.volume.kind "existingClaim" -}}
{{ required "model.volume.claimName: which claim?" .Values.model.volume.claimName }}
{{- else -}}
{{ include "llamaclust.fullname" . }}-models
{{- end }}
{{- end }}

{{/* What all models are pulled from, or where they are in the volume. */}}
{{- define "llamaclust.sources" -}}
{{- $sources := list }}
{{- range .Values.models }}{{ $sources = append $sources .model }}{{ end }}
{{- $sources | default (list .Values.model.source) | toYaml }}
{{- end }}

{{/* The program's model argument: the path of the file, or the name of the downloaded model. */}}
{{- define "llamaclust.modelSource" -}}
{{- if .root.Values.model.pull }}{{ .source }}
{{- else }}/var/lib/llamaclust/models/{{ .source | trimPrefix "/" }}
{{- end }}
{{- end }}

{{- define "llamaclust.privateVolume" -}}
- name: private
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end }}

{{/* A volume of secrets belongs to root and its group; the program requires files and folders that other users cannot read. */}}
{{- define "llamaclust.privateFiles" -}}
- name: private-files
  {{- include "llamaclust.container" .root | nindent 2 }}
  command:
    - sh
    - -ec
    - {{ .script | quote }}
  resources: {requests: {cpu: 10m, memory: 16Mi, ephemeral-storage: 16Mi}, limits: {memory: 64Mi, ephemeral-storage: 64Mi}}
  volumeMounts:
    - {name: secrets, mountPath: /run/secrets/llamaclust, readOnly: true}
    - {name: private, mountPath: /run/llamaclust}
{{- end }}

{{/* Whether a Job fetches the model for all pods, or each pod its own copy: not empty where that holds. */}}
{{- define "llamaclust.pullsOnce" -}}
{{- if and .Values.model.pull (has .Values.model.volume.kind (list "shared" "existingClaim")) }}true{{ end }}
{{- end }}

{{- define "llamaclust.pullsEach" -}}
{{- if and .Values.model.pull (not (include "llamaclust.pullsOnce" .)) }}true{{ end }}
{{- end }}

{{- define "llamaclust.pullModel" -}}
- name: model
  {{- include "llamaclust.container" . | nindent 2 }}
  command:
    {{- concat (list "timeout" (.Values.model.pullSeconds | int | toString) "llamaclust" "model" "pull") (include "llamaclust.sources" . | fromYamlArray) | toYaml | nindent 4 }}
  env:
    {{- include "llamaclust.folders" . | nindent 4 }}
    {{- with .Values.model.env }}{{ toYaml . | nindent 4 }}{{ end }}
  resources: {requests: {cpu: 100m, memory: 256Mi, ephemeral-storage: 64Mi}, limits: {memory: 1Gi, ephemeral-storage: 64Mi}}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: data, mountPath: /var/lib/llamaclust}
    {{- if ne .Values.model.volume.kind "perPod" }}
    - {name: models, mountPath: /var/lib/llamaclust/models}
    {{- end }}
{{- end }}

{{/* Whether most workers have no copy of the model and fetch their layers from others: not empty where that holds. */}}
{{- define "llamaclust.fetchesLayers" -}}
{{- if and (include "llamaclust.pullsEach" .) (eq .Values.model.pullers "first") }}true{{ end }}
{{- end }}

{{/* Of workers, where one pod of the cluster fetches the model for all. */}}
{{- define "llamaclust.workerModel" -}}
{{- if include "llamaclust.fetchesLayers" . }}
{{- $model := index (include "llamaclust.pullModel" . | fromYamlArray) 0 }}
{{- $first := printf "%s-worker-0" (include "llamaclust.fullname" .) }}
{{- $script := printf "[ \"$POD_NAME\" != %s ] || exec \"$@\"" $first }}
{{- $_ := set $model "command" (concat (list "sh" "-ec" $script "sh") $model.command) }}
{{- $name := dict "name" "POD_NAME" "valueFrom" (dict "fieldRef" (dict "fieldPath" "metadata.name")) }}
{{- $_ := set $model "env" (append $model.env $name) }}
{{- list $model | toYaml }}
{{- else }}
{{- include "llamaclust.model" . }}
{{- end }}
{{- end }}

{{/* What a worker's volume has left for fetched layers, in MiB. */}}
{{- define "llamaclust.weightsSize" -}}
{{- $free := include "llamaclust.bytes" .persistence.size | int64 }}
{{- range list .packedCacheSize (.kvDiskSize | default "0") }}
{{- $free = sub $free (include "llamaclust.bytes" (trimSuffix "B" .) | int64) }}
{{- end }}
{{- printf "%dMiB" (div (max $free 0) 1048576) }}
{{- end }}

{{/* Before a pod serves: its own copy, or a wait for the one that the Job fetches. */}}
{{- define "llamaclust.model" -}}
{{- if include "llamaclust.pullsEach" . }}
{{- include "llamaclust.pullModel" . }}
{{- else if include "llamaclust.pullsOnce" . }}
- name: model
  {{- include "llamaclust.container" . | nindent 2 }}
  command: [timeout, {{ .Values.model.pullSeconds | quote }}, sh, -c]
  args:
    - for source; do until llamaclust model info "$source" >/dev/null 2>&1; do sleep 5; done; done
    - sh
    {{- include "llamaclust.sources" . | nindent 4 }}
  env: {{- include "llamaclust.folders" . | nindent 4 }}
  resources: {requests: {cpu: 100m, memory: 256Mi, ephemeral-storage: 64Mi}, limits: {memory: 1Gi, ephemeral-storage: 64Mi}}
  volumeMounts: {{- include "llamaclust.dataMounts" . | nindent 4 }}
{{- end }}
{{- end }}

{{- define "llamaclust.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
