"""Helm charts, Kubernetes objects and pods."""
