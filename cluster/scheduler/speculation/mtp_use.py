from __future__ import annotations

from dataclasses import dataclass

_AGAIN = 64
"""The tokens after which a head that did not pay is tried again. The number doubles up to `_AGAIN_MOST`."""
_AGAIN_MOST = 1024
_DRAFTS = 6


@dataclass(slots=True)
class MtpUse:
    asked: int = 0  # tokens to draft behind its next step
    is_awaited: bool = False  # a step with drafts is under way
    _asked_at: int = 0  # tokens of the sequence
    _wait: int = _AGAIN
    _left: int = 0  # drafts of a retry that goes on

    def is_due(self, tokens: int) -> bool:
        return self._left > 0 or tokens - self._asked_at >= self._wait

    def order(self, tokens: int, count: int) -> None:
        if tokens - self._asked_at >= self._wait:
            self._left, self._wait = _DRAFTS, min(2 * self._wait, _AGAIN_MOST)
        elif self._left:
            self._left -= 1
        else:  # drafts pay again
            self._wait = _AGAIN
        self.asked, self._asked_at = count, tokens

    def take(self) -> int:
        asked, self.asked = self.asked, 0
        self.is_awaited = self.is_awaited or asked > 0
        return asked
