"""A cluster's workers: their events, drains and measurements."""
