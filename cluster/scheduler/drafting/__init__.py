"""Drafters guess the next tokens of a sequence from its earlier tokens. The pipeline verifies the guesses."""
