"""Manifests of models, and the cache of fetched tensors."""
