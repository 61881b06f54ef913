"""Splits of layers into stages: classes of workers, and the search for the best split."""
