"""Groups of workers that compute a stage together. Each worker computes some rows of each product's weights."""
