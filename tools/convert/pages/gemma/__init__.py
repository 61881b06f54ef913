"""Pages of Gemma models, and functions for the inputs per layer of E2B and E4B models."""
