"""Converts checkpoints to GGUF: formats, architectures (pages), vocabularies, and a streaming writer."""
