"""Converts a checkpoint to GGUF: readers of formats, architectures (pages), vocabularies, and a streaming writer."""
