"""Families of models as transformers' own classes compute them."""
