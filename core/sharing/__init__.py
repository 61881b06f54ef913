"""Fair sharing of scarce resources by several owners: `turns` for concurrent places, `shares` and `line` for units of
room, `computations` for values that several need."""
