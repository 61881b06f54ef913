"""Decides which tokens the pipeline computes next: batching, KV block tables, prefix cache, preemption. Does no I/O."""
