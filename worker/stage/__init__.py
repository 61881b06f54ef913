"""A loaded stage: receives microbatches, computes them, sends results on."""
