"""The coordinator's side of an epoch's stages: their pipeline and their KV memory on disk."""
