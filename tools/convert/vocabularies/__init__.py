"""Tokenizers as checkpoints carry them, as metadata of GGUF files."""
