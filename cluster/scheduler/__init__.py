"""Decides what the pipeline computes: continuous batching, KV block tables, prefix cache, preemption. Uses no I/O."""
