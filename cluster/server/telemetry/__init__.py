"""OpenTelemetry: spans of traced requests and the cluster's metrics, sent to a collector."""
