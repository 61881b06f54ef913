"""Tokenizers for the vocabularies in GGUF files: byte-level BPE, text BPE, SentencePiece, WordPiece."""
