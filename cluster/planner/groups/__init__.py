"""The search for plans in which groups of workers may hold stages: portions' costs, shares, and the best chain."""
