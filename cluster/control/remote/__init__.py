"""Connects the coordinator with an epoch's stages: their pipeline, image encoder, and KV blocks on disk."""
