"""KV memory of full blocks on disk, known by content: used after restarts and for long shared prompts."""
