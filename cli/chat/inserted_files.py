"""Replaces `@FILE` in a message with the file's text or image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from llamaclust.cluster.client.message_images import image_part
from llamaclust.cluster.config.values import expand_home
from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import open_regular, read_text
from llamaclust.model.images.formats import format_of

_MOST_BYTES: Final = 1 << 20
_HEAD_BYTES: Final = 64
_PUNCTUATION: Final = ".,;:!?)'"
_PLACE: Final = re.compile(rf'(?<!\S)@(?:"(?P<quoted>[^"\n]+)"|(?P<plain>[^\s"]*[^\s"{_PUNCTUATION}]))')
"""Matches `@FILE` and `@"MY FILE"`. Punctuation after a name without quotes belongs to the message."""


def with_files(text: str) -> str | list[dict[str, Any]]:
    """Replaces each `@FILE` with the file's text. If a file is an image, returns a list of OpenAI content parts. Raises
    UsageError if a file cannot be read, exceeds its size limit (1 MiB for text), or is neither text nor an image."""
    pieces: list[str | dict[str, Any]] = [""]
    end = 0
    for found in _PLACE.finditer(text):
        _append(pieces, text[end : found.start()])
        _append(pieces, _inserted(found["quoted"] or found["plain"]))
        end = found.end()
    _append(pieces, text[end:])
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(map(str, pieces))
    return [{"type": "text", "text": each} if isinstance(each, str) else each for each in pieces if each]


def _append(pieces: list[str | dict[str, Any]], piece: str | dict[str, Any]) -> None:
    last = pieces[-1]
    if isinstance(last, str) and isinstance(piece, str):
        pieces[-1] = last + piece
    else:
        pieces.append(piece)


def _inserted(name: str) -> str | dict[str, Any]:
    try:
        path = Path(expand_home(name))
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
        # A text may begin with the same letters as a BMP file, but a text has no zero bytes.
        if b"\0" in head and format_of(head) is not None:
            return image_part(path)
        return read_text(path, _MOST_BYTES).removesuffix("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        advice = (
            'give a text file or an image, as in @"my notes.txt", or put a space before the line to send it as it is'
        )
        raise UsageError(f"@{name}: {reason}; {advice}") from error
