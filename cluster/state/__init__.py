"""Owns the files that a cluster keeps on disk, and the events that a coordinator reports."""
