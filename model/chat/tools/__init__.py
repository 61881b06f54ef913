"""Tool calls and reasoning in answers: finds a model's format, parses answers, and constrains calls."""
