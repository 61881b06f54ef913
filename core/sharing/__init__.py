"""Fair sharing among owners, such as API clients. `turns` shares places for concurrent work, `shares` and `line` share
units of room, and `computations` shares computed values."""
