"""Fields of requests that several dialects share."""
