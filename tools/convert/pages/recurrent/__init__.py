"""Pages of models with a state of each sequence: convolutions, and Mamba 2."""
