"""Drafters guess the next tokens of a sequence, and the pipeline verifies them. Drafters know only tokens."""
