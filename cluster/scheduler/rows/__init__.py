"""Chooses the rows that a sequence has in a microbatch, and processes their results."""
