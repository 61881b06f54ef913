"""Full KV blocks on disk, named by their content, for restarts and for long shared prompts."""
