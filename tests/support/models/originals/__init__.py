"""Configurations of small models for transformers' own classes, by family."""
