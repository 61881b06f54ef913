"""A model's manifest and the cache of fetched tensors."""
