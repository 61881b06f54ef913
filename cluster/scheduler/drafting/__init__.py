"""Drafters guess a sequence's next tokens from its earlier tokens alone. The pipeline verifies the guesses."""
