"""Decides when to retry a source of drafts that did not make decoding faster."""

from __future__ import annotations

from dataclasses import dataclass

_WAIT = 64
"""Number of tokens from one retry to the next. It doubles up to `_LONGEST_WAIT`."""
_LONGEST_WAIT = 1024
_DRAFTS = 6


@dataclass(slots=True)
class Retry:
    again: int = _WAIT  # Sequence length at which the source is tried again.
    _wait: int = _WAIT
    _left: int = 0  # Number of drafts that the current retry may still make.

    @classmethod
    def after(cls, tokens: int) -> Retry:
        return cls(tokens + _WAIT)

    def is_due(self, tokens: int) -> bool:
        return self._left > 0 or tokens >= self.again

    def ordered(self, tokens: int) -> None:
        """Records that a draft was requested when the sequence had `tokens` tokens."""
        if tokens >= self.again:
            self._left, self._wait = _DRAFTS, min(2 * self._wait, _LONGEST_WAIT)
        elif self._left:
            self._left -= 1
        else:  # The source makes decoding faster, so it is used outside of retries.
            self._wait = _WAIT
        self.again = tokens + self._wait
