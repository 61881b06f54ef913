{{/* The coordinator, whether it has a pod of its own or sits beside the head of a Ray cluster. */}}
{{- define "llamaclust.coordinatorContainer" -}}
- name: coordinator
  {{- include "llamaclust.container" . | nindent 2 }}
  command: [llamaclust, up, /etc/llamaclust/cluster.yaml]
  env:
    {{- include "llamaclust.folders" . | nindent 4 }}
    {{- if .Values.ray.enabled }}
    # KubeRay passes its token to Ray's containers only.
    - {name: RAY_AUTH_MODE, value: token}
    - {name: RAY_AUTH_TOKEN_PATH, value: /run/llamaclust/auth_token}
    - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
    {{- end }}
    {{- with .Values.coordinator.extraEnv }}{{ toYaml . | nindent 4 }}{{ end }}
  ports:
    - {name: api, containerPort: {{ .Values.coordinator.ports.api }}}
    {{- if not .Values.ray.enabled }}
    - {name: join, containerPort: {{ .Values.coordinator.ports.join }}}
    - {name: control, containerPort: {{ include "llamaclust.controlPort" . }}}
    {{- end }}
  # The API answers once all workers have loaded; a start that waits too long ends by itself, a minute before this.
  # Where coordinators wait for a lease, /live answers from the beginning.
  startupProbe:
    httpGet: {path: /live, port: api, scheme: {{ include "llamaclust.apiScheme" . | upper }}}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: {{ add (div .Values.coordinator.startupSeconds 5) 12 }}
  # Requests are taken; not by a standby, which gets none from the Service.
  readinessProbe:
    httpGet: {path: /health, port: api, scheme: {{ include "llamaclust.apiScheme" . | upper }}}
    periodSeconds: 5
    timeoutSeconds: 5
  # It answers at all, and is not beyond what it can mend by itself.
  livenessProbe:
    httpGet: {path: /live, port: api, scheme: {{ include "llamaclust.apiScheme" . | upper }}}
    periodSeconds: 10
    timeoutSeconds: 10
    failureThreshold: 6
  resources: {{- include "llamaclust.resources" (dict "tmpSize" .Values.tmpSize "own" .Values.coordinator) | nindent 4 }}
  volumeMounts:
    {{- include "llamaclust.dataMounts" . | nindent 4 }}
    - {name: config, mountPath: /etc/llamaclust, readOnly: true}
    - {name: private, mountPath: /run/llamaclust, readOnly: true}
    {{- if include "llamaclust.lease" . }}
    - {name: account, mountPath: /run/kubernetes, readOnly: true}
    {{- end }}
    {{- if .Values.tls.existingSecret }}
    - {name: tls, mountPath: /run/tls, readOnly: true}
    {{- end }}
{{- end }}

{{- define "llamaclust.coordinatorInit" -}}
{{- $copy := "install -m 0600 -t /run/llamaclust /run/secrets/llamaclust/api-keys" }}
{{- if .Values.ray.enabled }}
{{- $copy = printf "%s /run/secrets/llamaclust/auth_token" $copy }}
{{- else }}
{{- $copy = printf "%s; cd /run/secrets/llamaclust; install -d -m 0700 /run/llamaclust/trust; install -m 0600 -t /run/llamaclust/trust token ca.crt ca.key" $copy }}
{{- end }}
{{- include "llamaclust.privateFiles" (dict "root" . "script" $copy) }}
{{- with include "llamaclust.model" . }}
{{ . }}
{{- end }}
{{- end }}

{{- define "llamaclust.coordinatorVolumes" -}}
- name: config
  configMap: {name: {{ include "llamaclust.fullname" . }}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- if .Values.ray.enabled }}
      - secret:
          name: {{ include "llamaclust.fullname" . }}-ray
          items:
            - {key: auth_token, path: auth_token}
      {{- else }}
      - secret:
          name: {{ include "llamaclust.joinSecret" . }}
          items:
            - {key: token, path: token}
      - secret:
          name: {{ include "llamaclust.authoritySecret" . }}
          items:
            - {key: ca.crt, path: ca.crt}
            - {key: ca.key, path: ca.key}
      {{- end }}
      - secret:
          name: {{ include "llamaclust.keysSecret" . }}
          items:
            - {key: api-keys, path: api-keys}
- name: data
  {{- if .Values.coordinator.persistence.enabled }}
  persistentVolumeClaim:
    claimName: {{ .Values.coordinator.persistence.existingClaim | default (printf "%s-coordinator" (include "llamaclust.fullname" .)) }}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.coordinator.persistence.size }}}
  {{- end }}
{{- if include "llamaclust.lease" . }}
- name: account
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- end }}
{{ include "llamaclust.privateVolume" . }}
{{ include "llamaclust.sharedVolumes" . }}
{{- end }}
