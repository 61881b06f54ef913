"""Scarce resources that several owners share fairly: `turns` for concurrent places, `shares` for units of room."""
