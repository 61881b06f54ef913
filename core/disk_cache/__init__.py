"""A cache on disk: the folder, and the functions that open, write and lock its files."""
