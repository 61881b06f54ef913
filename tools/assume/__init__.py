"""Plans for machines and models that are only described. Neither machines nor model files need to exist."""
