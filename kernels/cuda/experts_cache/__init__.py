"""Copies of often used experts on a GPU, beside which experts are in RAM."""
