"""Pure: guesses at the next tokens of a sequence, which the pipeline verifies. Knows no requests and no pipeline."""
