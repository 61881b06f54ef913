"""Drafters: they guess the next tokens of a sequence, which the pipeline verifies, and know no requests or
pipelines."""
