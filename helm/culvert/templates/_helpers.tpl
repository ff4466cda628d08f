{{/* Labels of every object. */}}
{{- define "culvert.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: culvert
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* Labels of the mesh's own pods: they never join the mesh. */}}
{{- define "culvert.podLabels" -}}
app: {{ .name }}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: culvert
istio.io/dataplane-mode: none
{{- end }}

{{- define "culvert.image" -}}
{{ .root.Values.image.repository }}/{{ .program }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* What every pod template begins with. */}}
{{- define "culvert.podSpec" -}}
serviceAccountName: {{ .name }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "culvert.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* A directory of the node: as given, or where the platform has it. */}}
{{- define "culvert.nodeDir" -}}
{{- $usual := dict "cniBinDir" "/opt/cni/bin" "cniConfDir" "/etc/cni/net.d" "cniNetnsDir" "/var/run/netns" }}
{{- $platforms := dict
  "gke" (dict "cniBinDir" "/home/kubernetes/bin")
  "k3d" (dict "cniBinDir" "/bin" "cniConfDir" "/var/lib/rancher/k3s/agent/etc/cni/net.d")
  "k3s" (dict "cniBinDir" "/var/lib/rancher/k3s/data/cni" "cniConfDir" "/var/lib/rancher/k3s/agent/etc/cni/net.d")
  "microk8s" (dict "cniBinDir" "/var/snap/microk8s/current/opt/cni/bin" "cniConfDir" "/var/snap/microk8s/current/args/cni-network")
  "minikube" (dict "cniNetnsDir" "/var/run/docker/netns")
}}
{{- $platform := get $platforms .root.Values.agent.platform | default dict }}
{{- get .root.Values.agent .key | default (get $platform .key) | default (get $usual .key) }}
{{- end }}
