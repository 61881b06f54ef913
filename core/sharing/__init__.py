"""Fair sharing of scarce resources by several owners: `turns` for concurrent places, `shares` for units of room."""
