"""What a model file says: GGUF, quant types, architectures, tokenizer, chat template."""
