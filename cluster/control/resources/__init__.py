"""What machines have: measured speeds of workers and links, and the shares of workers on one machine."""
