"""The scheduler's view of KV memory: KV blocks, sliding windows, states and shared prefixes."""
