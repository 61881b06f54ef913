"""The conversion of checkpoints to GGUF: readers of formats, architectures (pages), vocabularies, and a streaming
writer."""
