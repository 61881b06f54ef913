"""The search for plans whose stages may be held by groups of workers: costs of portions, shares, and the best chain."""
