"""Fair sharing among owners, such as API clients. `turns` limits concurrent work, `shares` and `line` divide a resource
such as memory, and `computations` shares computed values."""
