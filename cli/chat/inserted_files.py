"""Replaces `@FILE` in a message with the text of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from llamaclust.cluster.config.values import expand_home
from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import read_text

_MOST_BYTES: Final = 1 << 20
_PUNCTUATION: Final = ".,;:!?)'"
_PLACE: Final = re.compile(rf'(?<!\S)@(?:"(?P<quoted>[^"\n]+)"|(?P<plain>[^\s"]*[^\s"{_PUNCTUATION}]))')
"""Matches `@FILE` and `@"MY FILE"`. Punctuation after a name without quotes belongs to the message."""


def with_files(text: str) -> str:
    """Inserts the text of each file. Raises UsageError if one cannot be read, is larger than 1 MiB or is not text."""
    return _PLACE.sub(lambda found: _text(found["quoted"] or found["plain"]), text)


def _text(name: str) -> str:
    try:
        return read_text(Path(expand_home(name)), _MOST_BYTES).removesuffix("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        advice = 'give a text file, as in @"my notes.txt", or put a space before the line to send it as it is'
        raise UsageError(f"@{name}: {reason}; {advice}") from error
