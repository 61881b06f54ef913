"""Messages of every kind, damaged ones, and authenticated links."""
