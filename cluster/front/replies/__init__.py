"""Replies that outlive connections and coordinator restarts. Clients can read a kept reply again."""
