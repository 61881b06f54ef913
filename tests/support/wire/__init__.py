"""Messages of every kind, damaged messages, and authenticated links."""
