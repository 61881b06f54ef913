"""Resources of machines: measured speeds of workers and links, and the shares of workers on one machine."""
