"""Heads for multi-token prediction (MTP), in layers behind the others: their programs and costs."""
