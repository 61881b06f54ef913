"""The control loop: plans, loads and opens epochs, and recovers from failures."""
