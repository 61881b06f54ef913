"""Chooses the rows of a sequence in a microbatch, and processes their results."""
