"""A worker's weights: model files, and tensors from other workers."""
