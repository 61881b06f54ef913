"""A cache of frequently used experts on a GPU. RAM holds all experts."""
