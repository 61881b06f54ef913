"""Bookkeeping for KV memory: KV blocks, sliding windows, states and shared prefixes. The workers hold the data."""
