"""Turns requests into microbatches: continuous batching, KV block tables, prefix cache, preemption. It uses no I/O."""
