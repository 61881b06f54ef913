"""The coordinator's side of an epoch's stages: their pipeline, image encoder and KV memory on disk."""
