"""Converts checkpoints to GGUF: formats, converters of architectures, vocabularies, and a streaming writer."""
