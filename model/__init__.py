"""The contents of a model file: GGUF, quant types, architectures, tokenizer, chat template."""
