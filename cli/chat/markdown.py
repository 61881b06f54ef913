"""Renders Markdown on a terminal. The current block is shown as plain text and rendered when it is complete."""

from __future__ import annotations

import re
from typing import Final

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")
_PARSER: Final = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
"""A parser that treats HTML tags as text, because rich would omit them."""
_CODE_THEME: Final = "ansi_dark"  # This theme uses the terminal's own colors.


class MarkdownScreen:
    """Renders one answer. Text must be free of control characters."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._open = ""  # Text of the block that is not complete yet.
        self._live: Live | None = None
        self._has_rendered = False

    @property
    def can_render(self) -> bool:
        return not self._console.is_dumb_terminal

    def write(self, text: str) -> None:
        whole, self._open = split_blocks(self._open + text)
        if whole.strip():
            self._render(whole)
        if self._open.strip():
            self._show(self._open)

    def end(self) -> None:
        if self._open.strip():
            self._render(self._open)
        self._open = ""

    def _show(self, text: str) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        most = max(1, self._console.height - 2)
        last = "\n".join(text.rsplit("\n", most)[-most:])
        lines = Text(last).wrap(self._console, self._console.width)
        self._live.update(Text("\n").join(lines[-most:]), refresh=True)

    def _render(self, text: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._has_rendered:
            self._console.line()
        self._has_rendered = True
        for line in self._console.render_lines(rendered(text), pad=False):
            self._console.print(Segments([*_without_padding(line), Segment.line()]))


def _without_padding(line: list[Segment]) -> list[Segment]:
    """Removes the spaces that fill the line to the terminal's width. Users would copy them with the text."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


def split_blocks(text: str) -> tuple[str, str]:
    """Splits Markdown into complete blocks and the rest. An empty line ends a block, and a fence ends a code block."""
    fence, end, at = "", 0, 0
    for line in text.split("\n")[:-1]:  # The last line has not ended.
        at += len(line) + 1
        found = _FENCE.match(line)
        if fence:
            if found is not None and found[1].startswith(fence) and not line[found.end() :].strip():
                fence, end = "", at
        elif found is not None:
            fence = found[1]
        elif not line.strip():
            end = at
    return text[:end], text[end:]


def rendered(text: str) -> Markdown:
    """Parses Markdown for the library `rich`. Line breaks within a paragraph are kept, as is usual in chats."""
    markdown = Markdown(text, code_theme=_CODE_THEME, hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown
