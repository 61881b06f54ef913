"""Replies that outlive connections and restarts of the coordinator. Clients can read a kept reply again."""
