"""Pages of Gemma models, and the parts that its E models share."""
