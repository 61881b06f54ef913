"""The stages of an epoch as the coordinator reaches them: their pipeline, and their KV memory on disk."""
