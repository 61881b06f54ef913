"""A cache of often used experts on a GPU. RAM holds all experts."""
