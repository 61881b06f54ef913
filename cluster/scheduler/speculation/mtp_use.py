from __future__ import annotations

from dataclasses import dataclass

_AGAIN = 64
"""Number of tokens after which a head that did not pay is tried again. It doubles up to `_AGAIN_MOST`."""
_AGAIN_MOST = 1024
_DRAFTS = 6


@dataclass(slots=True)
class MtpUse:
    asked: int = 0  # Number of tokens to draft after the next step.
    is_awaited: bool = False  # True while a step that drafts tokens is in flight.
    _asked_at: int = 0  # Sequence length when drafts were last ordered.
    _wait: int = _AGAIN
    _left: int = 0  # Number of drafts left in the current retry.

    def is_due(self, tokens: int) -> bool:
        return self._left > 0 or tokens - self._asked_at >= self._wait

    def order(self, tokens: int, count: int) -> None:
        if tokens - self._asked_at >= self._wait:
            self._left, self._wait = _DRAFTS, min(2 * self._wait, _AGAIN_MOST)
        elif self._left:
            self._left -= 1
        else:  # Drafts pay, because they are ordered outside a retry.
            self._wait = _AGAIN
        self.asked, self._asked_at = count, tokens

    def take(self) -> int:
        asked, self.asked = self.asked, 0
        self.is_awaited = self.is_awaited or asked > 0
        return asked
