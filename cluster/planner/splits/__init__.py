"""Splits of layers into stages, classes of equal workers, and the search for the best split."""
