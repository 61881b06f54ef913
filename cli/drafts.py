"""Formats the number of accepted draft tokens."""

from __future__ import annotations


def accepted_text(accepted: int, drafted: int) -> str:
    return f"{accepted} of {drafted} drafted tokens accepted"
