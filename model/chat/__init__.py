"""Chat templates: chosen, rendered in a sandboxed child process."""
