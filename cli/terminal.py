"""What reaches a terminal: text from files, models and networks must not drive it."""

from __future__ import annotations

import re
import sys

_CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")
_LONG_WORD = re.compile(r"(\S{100})\S{100,}(\S{50})")
"""A path or the like of which the ends are enough to know it by."""


def write(text: str) -> None:
    """To standard output, at once: as it is, but on a terminal without control characters other than \\n and \\t."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """One line, in which whatever cannot be printed stands as its escape."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def print_error(message: object) -> None:
    """One line on standard error, short where a name in it is long."""
    short = _LONG_WORD.sub(r"\1...\2", printable(str(message)))
    print(f"error: {short}", file=sys.stderr)
