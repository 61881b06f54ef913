"""The two kinds of vocabulary that GGUF files of the LLaMA family carry, and what they share."""
