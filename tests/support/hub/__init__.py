"""Web servers that misbehave on request."""
