"""Reads typed or piped input: messages and commands of one or more lines."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llamaclust.cli.chat.line_history import LineHistory
from llamaclust.core.errors import UsageError

_QUOTES: Final = '"""'
_FIRST_PROMPT: Final = "> "
_NEXT_PROMPT: Final = ". "
_BRIGHT: Final = ("\001\033[1;32m\002", "\001\033[0m\002")
"""Escape codes before and after a colored prompt. The characters 1 and 2 tell readline that the codes take no space."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A message or a command. If `is_literal` is True, the text is sent unchanged as a message."""

    text: str
    is_literal: bool = False


class Entries:
    """Reads entries from standard input. On a terminal, readline lets the user edit a line and recall earlier lines."""

    def __init__(self, history: Path, *, is_colored: bool, takes_commands: bool) -> None:
        """Opens standard input. `history` is the file of earlier lines. If `takes_commands` is False, piped lines are
        never run as commands."""
        self._is_terminal = sys.stdin.isatty()
        self._is_literal = not (self._is_terminal or takes_commands)
        self._edits = self._is_terminal and sys.stdout.isatty()
        self._history: LineHistory | None = None
        if self._edits:
            with suppress(ImportError):
                self._history = LineHistory(history)
        self._color = _BRIGHT if is_colored and self._history is not None else ("", "")

    def read(self) -> Entry:
        """Returns the next entry. Raises EOFError at the end of the input, and UsageError if an entry is incomplete."""
        line = self._line(_FIRST_PROMPT)
        if line.startswith(" "):
            return Entry(line.strip(), is_literal=True)
        if line.startswith(_QUOTES):
            return Entry(self._quoted(line.removeprefix(_QUOTES)), is_literal=True)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._next("a message whose last line ends with a backslash"))
        return Entry("\n".join(lines).strip(), self._is_literal)

    def _quoted(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(self._next(f"a message that begins with {_QUOTES}"))
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return "\n".join(lines).strip("\n")

    def _next(self, within: str) -> str:
        try:
            return self._line(_NEXT_PROMPT)
        except EOFError:
            raise UsageError(f"the input ended within {within}") from None

    def _line(self, prompt: str) -> str:
        if self._edits:
            line = input(prompt.join(self._color))
            if self._history is not None:
                self._history.add(line)
            return line
        if self._is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        return _piped_line()


def _piped_line() -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not {sys.stdin.encoding} text: {error.reason}") from error
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
