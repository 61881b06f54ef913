"""Full KV blocks on disk, named by their content, for restarts and long shared prompts."""
