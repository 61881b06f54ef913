"""GGUF files: header, metadata, tensors, writer."""
