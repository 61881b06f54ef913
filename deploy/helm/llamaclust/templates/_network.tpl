{{/* A listener's options: all addresses of a pod, and the advertised one. */}}
{{- define "llamaclust.anywhere" -}}
{{ ternary "[::]" "0.0.0.0" .Values.ipv6 }}
{{- end }}

{{- define "llamaclust.podAddress" -}}
{{ ternary "[$(POD_IP)]" "$(POD_IP)" .Values.ipv6 }}
{{- end }}

{{/* What every pod may call. Policies may see the ports of pods behind a Service: OpenShift's DNS listens on 5353. */}}
{{- define "llamaclust.egress" -}}
- ports:
{{- range list 53 5353 }}
    - {protocol: UDP, port: {{ . }}}
    - {protocol: TCP, port: {{ . }}}
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What pods that download may call besides. */}}
{{- define "llamaclust.downloads" -}}
{{- with .Values.networkPolicy.downloadTo }}
- ports:
    - {protocol: TCP, port: 443}
  to: {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}
