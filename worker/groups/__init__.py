"""Links between the members of a group: listener, connections by plan and certificate, and gathers over them."""
