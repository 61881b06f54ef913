"""Drafters guess the next tokens of a sequence, which the pipeline verifies. They know no requests or pipelines."""
