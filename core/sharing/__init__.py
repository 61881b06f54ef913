"""Scarce resources that owners share: places by turns, room by shares."""
