{{- define "bagel.labels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .stage }}
{{- end }}

{{- define "bagel.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{/* What both workloads share of a pod: the user, the devices, the volumes. */}}
{{- define "bagel.pod" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ add .root.Values.shutdownTimeout 40 }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.shmSize }}}
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
  - name: checkpoint
    persistentVolumeClaim:
      claimName: {{ required "checkpoint.claim: name the PersistentVolumeClaim that holds the checkpoint" .root.Values.checkpoint.claim }}
      readOnly: true
{{- end }}

{{/* What both workloads share of a container. */}}
{{- define "bagel.container" -}}
image: {{ include "bagel.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
env:
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  {{- if and (eq .stage "stage0") .root.Values.apiKeySecret }}
  - name: BAGEL_API_KEY
    valueFrom: {secretKeyRef: {name: {{ .root.Values.apiKeySecret }}, key: api-key}}
  {{- end }}
resources: {{- toYaml .values.resources | nindent 2 }}
volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
  - name: checkpoint
    mountPath: /checkpoint
    readOnly: true
    {{- with .root.Values.checkpoint.subPath }}
    subPath: {{ . }}
    {{- end }}
{{- end }}

{{/* Options of `serve` that both workloads have. */}}
{{- define "bagel.args" -}}
- --dtype={{ .root.Values.dtype }}
- --init-timeout={{ .root.Values.initTimeout }}
- --shutdown-timeout={{ .root.Values.shutdownTimeout }}
{{- range concat .root.Values.extraArgs .values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
