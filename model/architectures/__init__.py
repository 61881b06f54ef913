"""Architectures as pages that emit programs."""
