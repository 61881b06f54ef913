"""Numbers of epochs: the term of the coordinator that opened one, and which of its epochs it is."""

from __future__ import annotations

_TERM_SHIFT = 32
MAX_TERM = (1 << 32) - 1


def epoch_number(term: int, count: int) -> int:
    """The `count`th epoch of a term, as messages carry it (64 bits): larger than those of all smaller terms."""
    return term << _TERM_SHIFT | count


def term_of(epoch: int) -> int:
    return epoch >> _TERM_SHIFT


def epoch_text(epoch: int) -> str:
    """As people read it: TERM.COUNT."""
    return f"{term_of(epoch)}.{epoch & MAX_TERM}"


def place_text(place: tuple[int, int]) -> str:
    """Of a microbatch: (epoch, number)."""
    epoch, number = place
    return f"{number} of epoch {epoch_text(epoch)}"
