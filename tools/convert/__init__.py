"""From any checkpoint to a GGUF file: readers, pages of architectures, vocabularies, and a writer that streams."""
