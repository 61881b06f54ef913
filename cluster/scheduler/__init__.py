"""Pure: from requests to microbatches. Continuous batching, KV block tables, prefix cache, preemption."""
