"""What a sequence asks of an MTP head. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_AGAIN = 64
"""Tokens after which a head whose drafts did not pay is tried once more; each time twice as many, up to: """
_AGAIN_MOST = 1024
_DRAFTS = 6
"""Of such a retry."""


@dataclass(slots=True)
class MtpUse:
    """Of one sequence."""

    asked: int = 0  # tokens to draft behind its next step
    is_awaited: bool = False  # a step with drafts is under way
    _asked_at: int = 0  # tokens of the sequence
    _wait: int = _AGAIN
    _left: int = 0  # drafts of a retry that goes on

    def is_due(self, tokens: int) -> bool:
        """Whether the head is tried, although what is known says that it does not pay."""
        return self._left > 0 or tokens - self._asked_at >= self._wait

    def order(self, tokens: int, count: int) -> None:
        """For so many drafted tokens behind the next step of a sequence of so many."""
        if tokens - self._asked_at >= self._wait:
            self._left, self._wait = _DRAFTS, min(2 * self._wait, _AGAIN_MOST)
        elif self._left:
            self._left -= 1
        self.asked, self._asked_at = count, tokens

    def take(self) -> int:
        """Tokens to draft behind a step that is sent."""
        asked, self.asked = self.asked, 0
        self.is_awaited = self.is_awaited or asked > 0
        return asked
