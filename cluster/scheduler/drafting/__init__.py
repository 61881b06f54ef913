"""Drafters guess the next tokens of a sequence from its tokens alone. The pipeline verifies the guesses."""
