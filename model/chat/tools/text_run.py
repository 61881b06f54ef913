"""Emits content or reasoning without the white space around markers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from llamaclust.model.chat.tools.events import AnswerEvent

_MAX_HELD: Final = 64


class TextRun:
    """A run of content or reasoning. Holds back white space at its end until more text or a marker follows."""

    def __init__(self, put: Callable[[AnswerEvent], None], event: Callable[[str], AnswerEvent]) -> None:
        self._put = put
        self._event = event
        self._held = ""
        self._skips_space = False
        self.has_begun = False  # True after text other than white space.

    def push(self, text: str) -> None:
        text = self._held + text
        if self._skips_space:
            text = text.lstrip()
        shown = text.rstrip()
        self.has_begun = self.has_begun or bool(shown)
        self._skips_space = self._skips_space and not shown
        keep = min(len(text) - len(shown), _MAX_HELD)
        self._held = text[len(text) - keep :] if keep else ""
        self._put(self._event(text[: len(text) - keep]))

    @property
    def is_cut(self) -> bool:
        return self._skips_space

    def cut(self) -> None:
        """Drops white space at the end of the text so far and at the beginning of the next text."""
        self._held = ""
        self._skips_space = True

    def end(self) -> None:
        self._put(self._event(self._held))
        self._held = ""
