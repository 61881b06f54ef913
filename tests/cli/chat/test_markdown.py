"""Checks that Markdown is shown equally on a terminal, however the text is divided into parts."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from llamaclust.cli.chat.markdown import MarkdownScreen, split_blocks

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TEXT = """# Title

One *two* **three**
and `four`

```py
def f():

    return 1
```
- a
- b

<tag> stays

| c | d |
|---|---|
| e | f |
"""


def shown(text: str, size: int, *, is_live: bool = False) -> str:
    """Returns the final screen or, with `is_live`, all that was written."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=20, color_system="standard", highlight=False)
    screen = MarkdownScreen(console)
    for start in range(0, len(text), size):
        screen.write(text[start : start + size])
    screen.end()
    return file.getvalue() if is_live else _last_lines(file.getvalue())


def _last_lines(written: str) -> str:
    """Returns the final lines after the only escapes of a live display, "cursor up" and "erase line"."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return "\n".join(line.rstrip() for line in lines).strip()


@pytest.mark.parametrize("size", [1, 7, len(TEXT)])
def test_the_end_is_the_same_however_the_text_comes(size: int) -> None:
    final = shown(TEXT, size)
    assert "**" not in final and "```" not in final and "#" not in final
    words = ("Title", "One two three\nand four", "def f():\n\n     return 1", "• a", "<tag> stays", "e")
    for word in words:
        assert word in final, final


def test_an_open_block_is_shown_at_once() -> None:
    assert "half a par" in shown("half a par", 3, is_live=True)


def test_a_block_longer_than_the_screen_is_whole_in_the_end() -> None:
    text = "\n".join(f"line {number}" for number in range(60))
    final = shown(text, 10)
    assert [f"line {number}" for number in range(60)] == re.findall(r"line \d+", final)


def test_each_part_wraps_no_more_than_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped, wrap = list[int](), Text.wrap

    def counted(text: Text, *args: Any, **options: Any) -> Any:
        wrapped.append(text.plain.count("\n"))
        return wrap(text, *args, **options)

    monkeypatch.setattr(Text, "wrap", counted)
    screen = MarkdownScreen(Console(file=io.StringIO(), force_terminal=True, width=60, height=20))
    for number in range(60):
        screen.write(f"line {number}\n")
    assert len(wrapped) >= 60 and max(wrapped) < 20
    screen.end()


@pytest.mark.parametrize(
    ("text", "whole", "rest"),
    [
        ("a\n\nb", "a\n\n", "b"),
        ("a\nb", "", "a\nb"),
        ("```\na\n\nb", "", "```\na\n\nb"),
        ("```\na\n```\nb", "```\na\n```\n", "b"),
        ("````\n```\n\n````\nb", "````\n```\n\n````\n", "b"),
        ("~~~ x\n```\n~~~\n", "~~~ x\n```\n~~~\n", ""),
        ("a\u2028b\n\nc\u2029\n\nd", "a\u2028b\n\nc\u2029\n\n", "d"),
        ("", "", ""),
    ],
)
def test_blocks_end_with_an_empty_line_or_their_fence(text: str, whole: str, rest: str) -> None:
    assert split_blocks(text) == (whole, rest)
