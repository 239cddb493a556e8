{{- /* Only functions of Go's own templates are used, so that tools/chart.py can render the chart without Helm. */ -}}
{{- define "loraf.labels" -}}
app.kubernetes.io/name: loraf
    app.kubernetes.io/instance: {{ .Release.Name }}
    app.kubernetes.io/version: {{ printf "%q" .Chart.AppVersion }}
    app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
{{- define "loraf.probe" -}}
{{- if .Values.tls.secret -}}
exec:
              command:
                - loraf-client
                - health
                - --server={{ .Release.Name }}.{{ .Release.Namespace }}.svc:50051
                - --tls-ca=/tls/ca.crt
                - --timeout=8
{{- else -}}
grpc: {port: 50051}
{{- end -}}
{{- end -}}
