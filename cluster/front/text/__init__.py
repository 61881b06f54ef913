"""Text generation: chats, prompts, answers, embeddings, and the service that connects them to an engine."""
