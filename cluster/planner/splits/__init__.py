"""Searches for the best split of a model's layers into stages."""
