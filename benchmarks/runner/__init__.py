"""Code that all cases share: options, turns, tables, clusters and models."""
