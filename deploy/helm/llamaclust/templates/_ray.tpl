{{/* Resources of each worker, declared to Ray, which has no pod to read them from. */}}
{{- define "llamaclust.rayWorkers" -}}
{{- range $index := until (int .Values.workers.count) }}
- name: worker-{{ $index }}
  threads: {{ $.Values.workers.threads }}
  {{- with $.Values.workers.memory }}
  memory: {{ . }}
  {{- end }}
  {{- with $.Values.workers.kvDiskSize }}
  kv_disk: {{ . }}
  {{- end }}
  {{- with $.Values.workers.gpu }}
  {{- if .count }}
  device: "{{ include "llamaclust.gpus" .count }}"
  gpu_layers: {{ .layers }}
  {{- with .memory }}
  gpu_memory: {{ . }}
  {{- end }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* KubeRay starts Ray in a group's first container by a command of its own, and adds what Ray needs of environment. */}}
{{- define "llamaclust.rayContainer" -}}
{{- include "llamaclust.container" . }}
env:
  {{- include "llamaclust.folders" . | nindent 2 }}
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  - {name: LLAMACLUST_CACHE_SIZE, value: {{ .Values.workers.packedCacheSize | quote }}}
{{- end }}
