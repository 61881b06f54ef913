"""Connects the coordinator with the stages on workers: their pipeline, image encoder, and KV blocks on disk."""
