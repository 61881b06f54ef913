"""Tool calls and reasoning in the text of an answer: formats derived from chat templates, parsing, constraints."""
