"""Assigns layers to workers, from facts about the model, the workers and the links. All functions are pure."""
