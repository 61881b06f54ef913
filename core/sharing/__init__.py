"""Fair sharing of scarce resources among owners. `turns` shares concurrent places, `shares` and `line` share units of
room, and `computations` shares values that several callers need."""
