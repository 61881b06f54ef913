"""The machines' resources: measured speeds of workers and links, and each worker's share of its machine."""
