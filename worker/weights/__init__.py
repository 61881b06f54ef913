"""A worker's weights: model files, and tensors fetched from other workers."""
