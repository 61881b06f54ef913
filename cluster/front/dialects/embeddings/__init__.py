"""Embeddings of prompts, by the names of OpenAI and llama.cpp."""
