"""Full KV blocks on disk, found by their content: for restarts and long shared prompts."""
