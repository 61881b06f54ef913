{{/* What every pod may call: names, and the model's source. */}}
{{- define "llamaclust.egress" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- if .Values.model.pull }}
- ports:
    - {protocol: TCP, port: 443}
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}
