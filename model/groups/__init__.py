"""Groups of workers that compute one stage together. Each worker computes some rows of every product's weights."""
