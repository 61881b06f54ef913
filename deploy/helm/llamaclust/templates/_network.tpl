{{/* A listener's options: all addresses of a pod, and the advertised one. */}}
{{- define "llamaclust.anywhere" -}}
{{ ternary "[::]" "0.0.0.0" .Values.ipv6 }}
{{- end }}

{{- define "llamaclust.podAddress" -}}
{{ ternary "[$(POD_IP)]" "$(POD_IP)" .Values.ipv6 }}
{{- end }}

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
