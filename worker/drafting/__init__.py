"""A small draft model, which runs in the coordinator's process."""
