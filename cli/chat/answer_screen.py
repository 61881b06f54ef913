"""Displays an answer while it is generated, with or without colors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from llamaclust.cli import terminal
from llamaclust.cli.terminal import Color
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.front.text.answer import TextChunk

if TYPE_CHECKING:
    from llamaclust.cli.chat.markdown import MarkdownScreen

_DIM: Final = "\033[2m"
_RESET: Final = "\033[0m"


def uses_color(color: Color) -> bool:
    return color is Color.ON or (color is Color.AUTO and sys.stdout.isatty() and environment().has_colors)


class AnswerScreen:
    """Writes one answer to standard output. Reasoning is shown only on a terminal, dimmed or below a heading."""

    def __init__(self, *, is_colored: bool, renders_markdown: bool = False) -> None:
        self._is_colored = is_colored
        self._markdown = _markdown_screen() if renders_markdown and is_colored else None
        self._shows_reasoning = sys.stdout.isatty()
        self._is_reasoning = False
        self._is_empty = True
        self._has_hidden_reasoning = False

    @property
    def hides_all(self) -> bool:
        return self._is_empty and self._has_hidden_reasoning

    def show(self, chunk: TextChunk) -> None:
        self._has_hidden_reasoning |= bool(chunk.reasoning) and not self._shows_reasoning
        if self._shows_reasoning and chunk.reasoning:
            if not self._is_reasoning:
                sys.stdout.write(_DIM if self._is_colored else "[reasoning]\n")
            self._is_reasoning, self._is_empty = True, False
            terminal.write(chunk.reasoning)
        if chunk.text:
            if self._is_reasoning:
                self._end_reasoning()
                sys.stdout.write("\n\n" if self._is_colored else "\n[answer]\n")
            self._is_empty = False
            self._write(chunk.text)

    def _write(self, text: str) -> None:
        if self._markdown is None:
            terminal.write(text)
        else:
            self._markdown.write(terminal.harmless(text))

    def end(self) -> None:
        if self._markdown is not None and not (self._is_empty or self._is_reasoning):
            self._markdown.end()
            return
        self._end_reasoning()
        print(flush=True)

    def fail(self) -> None:
        if not self._is_empty:
            self.end()

    def _end_reasoning(self) -> None:
        if self._is_reasoning and self._is_colored:
            sys.stdout.write(_RESET)
        self._is_reasoning = False


def _markdown_screen() -> MarkdownScreen | None:
    # This import would slow the start of every command, because it loads rich's Markdown parser.
    from llamaclust.cli.chat.markdown import MarkdownScreen

    screen = MarkdownScreen()
    return screen if sys.stdout.isatty() and screen.can_render else None
