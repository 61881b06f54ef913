"""The copies of often used experts on a GPU, whose other experts are in RAM."""
