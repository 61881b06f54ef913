"""Tokenizers of checkpoints, converted to metadata of GGUF files."""
