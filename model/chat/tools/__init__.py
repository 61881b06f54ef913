"""Tool calls and reasoning in answers: derives their format from the chat template, parses answers, and constrains
calls."""
