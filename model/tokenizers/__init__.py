"""Tokenizers of the vocabularies in GGUF files: byte-level and text BPE, SentencePiece, WordPiece."""
