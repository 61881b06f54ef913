"""Keeps the lines typed in this chat and earlier chats in a file, so that readline can recall them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from llamaclust.cli.chat.file_completion import completed_file
from llamaclust.core.regular_file import read_text, write_text

_LINES: Final = 1000
_CHARACTERS: Final = 4096
"""Maximum number of characters in a kept line. A longer line was probably pasted, not typed."""
_MOST_BYTES: Final = 64 << 20


class LineHistory:
    """Lets users edit and recall lines in input(), and appends typed lines to a file that concurrent chats share."""

    def __init__(self, path: Path) -> None:
        """Raises ImportError if Python was built without readline."""
        import readline

        self._path = path
        self._add = readline.add_history
        readline.set_auto_history(False)
        readline.set_completer_delims(" \t\n")
        readline.set_completer(completed_file)
        readline.parse_and_bind("tab: complete")
        for line in self._earlier():
            self._add(line)

    def add(self, line: str) -> None:
        """Appends the line to the file at once."""
        if not line.strip() or len(line) > _CHARACTERS:
            return
        self._add(line)
        with suppress(OSError, UnicodeEncodeError):
            data = f"{line}\n".encode()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(self._path, flags, 0o600), "ab") as file:
                file.write(data)

    def _earlier(self) -> list[str]:
        with suppress(OSError, ValueError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lines = read_text(self._path, _MOST_BYTES).split("\n")[:-1]
            if len(lines) > _LINES:
                lines = lines[-_LINES:]
                write_text(self._path, "".join(f"{line}\n" for line in lines))
            return lines
        return []
