"""A cache on a GPU of often used experts. All experts are in RAM too."""
