"""A loaded stage. It receives microbatches, computes them, and sends the results on."""
