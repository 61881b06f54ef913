"""Rows of a sequence in a microbatch: which they are, and what their results are for."""
