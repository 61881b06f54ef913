"""Full KV blocks on disk, named by their content, for restarts and for long prompts that requests share."""
