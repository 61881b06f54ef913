"""The scheduler's view of KV memory: KV blocks, windows, states of sequences, shared prefixes."""
