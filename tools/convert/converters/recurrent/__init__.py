"""Converters of models that keep a recurrent state for each sequence."""
