"""Heads that predict further tokens, in layers behind the others: their programs and costs."""
