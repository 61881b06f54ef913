"""Pure functions that make a plan of layer ranges from facts about the model, the workers and the links."""
