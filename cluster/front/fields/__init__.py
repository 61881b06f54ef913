"""Fields of requests and replies that several dialects share."""
