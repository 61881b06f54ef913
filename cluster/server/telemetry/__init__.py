"""Sends spans of traced requests and the cluster's metrics to an OpenTelemetry collector."""
