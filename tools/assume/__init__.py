"""Assumed plans: what a set of machines would do with a model, without machines or model file."""
