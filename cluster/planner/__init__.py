"""Pure functions from facts about model, workers and links to a plan of layer ranges."""
