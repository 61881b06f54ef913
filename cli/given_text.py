"""Text that a user gives: as an argument or on standard input, UTF-8 in both."""

from __future__ import annotations

import sys

from llamaclust.core.errors import UsageError


def argument(text: str) -> str:
    """The argument. UsageError where its bytes are not UTF-8, which Python hides in lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not UTF-8 at character {error.start + 1}: {text[:40]!a}") from error
    return text


def piped() -> str:
    """Standard input to its end. UsageError where it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: {error}") from error
