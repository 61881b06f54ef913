{{/* The chart's values with those of one group of workers over them. */}}
{{- define "llamaclust.ofGroup" -}}
{{- $values := deepCopy (.root.Values | toYaml | fromYaml) }}
{{- $_ := set $values "workers" (mergeOverwrite $values.workers .own) }}
{{- dict "Values" $values | toYaml }}
{{- end }}

{{/* Of all groups together. */}}
{{- define "llamaclust.workerCount" -}}
{{- $count := int .Values.workers.count }}
{{- range .Values.workers.groups }}{{ $count = add $count (.count | default $.Values.workers.count) }}{{ end }}
{{- $count }}
{{- end }}

{{- define "llamaclust.workerArguments" -}}
- --join={{ include "llamaclust.fullname" . }}-coordinator:{{ .Values.coordinator.ports.join }}
- --token-file=/run/llamaclust/token
- --name=$(POD_NAME)
- --listen={{ include "llamaclust.podAddress" . }}:{{ .Values.workers.port }}
- --link-port={{ .Values.workers.linkPort }}
- --threads={{ .Values.workers.threads | default "$(CORES)" }}
{{- with .Values.workers.memory }}
- --memory={{ . }}
{{- end }}
{{- with .Values.workers.kvDiskSize }}
- --kv-disk={{ . }}
{{- end }}
- --model-dir=/var/lib/llamaclust/models
- --ready-file=/tmp/ready
{{- with .Values.workers.gpu }}
{{- if .count }}
- --device={{ include "llamaclust.gpus" .count }}
- --gpu-layers={{ .layers }}
{{- with .memory }}
- --gpu-memory={{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Succeeds while a socket of the pod listens on the worker's port. `0A` is the state LISTEN: proc_pid_net(5). */}}
{{- define "llamaclust.listens" -}}
{{ list "grep" "-qE" (printf ":%04X [0-9A-F]+:0000 0A " (int .Values.workers.port)) "/proc/net/tcp" "/proc/net/tcp6" | toJson }}
{{- end }}

{{/* In a pod they are numbered from 0, whichever of the node's they are. */}}
{{- define "llamaclust.gpus" -}}
{{- range $number := until (int .) }}{{ if $number }},{{ end }}cuda:{{ $number }}{{ end }}
{{- end }}

{{/* Without a request Kubernetes would hand out all cores of the node as `requests.cpu`. */}}
{{- define "llamaclust.workerResources" -}}
{{- $resources := include "llamaclust.resources" (dict "tmpSize" .Values.tmpSize "own" .Values.workers) | fromYaml }}
{{- if .Values.workers.gpu.count }}
{{- $_ := set $resources "limits" (merge (dict .Values.workers.gpu.resource (toString .Values.workers.gpu.count)) ($resources.limits | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* Workers away from each other: two on one node share its memory bandwidth. */}}
{{- define "llamaclust.apart" -}}
{{- $labels := printf "%s\napp.kubernetes.io/component: worker" (include "llamaclust.selector" .) | fromYaml }}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) }}
{{- if .Values.workers.affinity }}
affinity: {{- toYaml .Values.workers.affinity | nindent 2 }}
{{- else if eq .Values.workers.antiAffinity "required" }}
affinity:
  podAntiAffinity:
    requiredDuringSchedulingIgnoredDuringExecution: {{- list $term | toYaml | nindent 6 }}
{{- else if eq .Values.workers.antiAffinity "preferred" }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm: {{- toYaml $term | nindent 10 }}
{{- end }}
{{- with .Values.workers.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: {matchLabels: {{ toJson $labels }}}
  {{- end }}
{{- end }}
{{- end }}
