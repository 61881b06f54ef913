"""Text generation: chats, prompts, answers, embeddings, and the service through which endpoints use the engine."""
