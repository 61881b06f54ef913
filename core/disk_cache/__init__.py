"""A cache on disk, and functions that open, write and lock its files."""
