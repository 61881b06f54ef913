"""Epoch numbers. A number combines a coordinator's term with a count of the epochs that were opened in this term."""

from __future__ import annotations

_TERM_SHIFT = 32
MAX_TERM = (1 << 32) - 1


def epoch_number(term: int, count: int) -> int:
    """Returns the 64-bit number of epoch `count` in a term. It is greater than all numbers of smaller terms."""
    return term << _TERM_SHIFT | count


def term_of(epoch: int) -> int:
    return epoch >> _TERM_SHIFT


def epoch_text(epoch: int) -> str:
    return f"{term_of(epoch)}.{epoch & MAX_TERM}"


def place_text(place: tuple[int, int]) -> str:
    epoch, number = place
    return f"{number} of epoch {epoch_text(epoch)}"
