"""The page for browsers, as static files."""
