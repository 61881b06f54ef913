"""The HTTP APIs of OpenAI, Anthropic, llama.cpp and Ollama: request bodies, endpoints, and the JSON of replies."""
