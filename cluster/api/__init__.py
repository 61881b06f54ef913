"""The HTTP API: OpenAI's and llama.cpp's endpoints, health, metrics, the cluster's state."""
