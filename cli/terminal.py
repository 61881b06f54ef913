"""Checks text from the user, and makes text safe to print on a terminal."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from typing import Any

from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import decode_text

_CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")
_LONG_WORD = re.compile(r"(\S{100})\S{100,}(\S{50})")
"""Matches a long word, such as a path. The groups are the word's beginning and end, which suffice to recognize it."""


class Color(StrEnum):
    """Values of --color. `auto` means colors on a terminal that supports them, unless NO_COLOR is set."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def write(text: str) -> None:
    r"""Writes to standard output and flushes it. A terminal gets no control characters other than \n and \t."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def harmless(text: str) -> str:
    r"""Removes control characters other than \n and \t."""
    return text.translate(_CONTROLS)


def printable(text: str) -> str:
    """Returns one line, with escapes for characters that cannot be printed."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def printable_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): printable_values(each) for key, each in value.items()}
    if isinstance(value, list):
        return [printable_values(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def print_error(message: object) -> None:
    """Prints one line on standard error. Long words, such as paths, are shortened."""
    short = _LONG_WORD.sub(r"\1...\2", printable(str(message)))
    print(f"error: {short}", file=sys.stderr)


def argument(text: str) -> str:
    """Returns an argument of the command line unchanged. Raises UsageError if its bytes are not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"character {error.start + 1} of the text is not valid UTF-8: {text[:40]!a}") from error
    return text


def piped() -> str:
    """Reads standard input to its end. Raises UsageError if the input is not UTF-8 text."""
    try:
        return decode_text(sys.stdin.buffer.read())
    except ValueError as error:
        raise UsageError(f"standard input: {error}") from error
