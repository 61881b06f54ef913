"""Chooses chat templates and renders them in sandboxed child processes."""
