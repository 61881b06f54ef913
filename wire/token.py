"""The cluster token: what a process must show before any byte of it is read. It lives in a file of mode 0600."""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from llamaclust.errors import UsageError

_LEAST_CHARACTERS = 32
_MOST_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class ClusterToken:
    """A shared secret; not shown when printed."""

    value: str = field(repr=False)

    @classmethod
    def create(cls, path: Path) -> ClusterToken:
        """A new random token, written to a new file that only its owner may read."""
        token = cls(secrets.token_urlsafe(32))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token.value + "\n")
        return token

    @classmethod
    def read(cls, path: Path) -> ClusterToken:
        """The token in a file; UsageError where there is none or others may read it."""
        try:
            with path.open() as file:
                mode = os.fstat(file.fileno()).st_mode
                value = file.read(_MOST_CHARACTERS + 1).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"token file {path}: cannot be read: {error}") from error
        if stat.S_IMODE(mode) & 0o077:
            raise UsageError(f"token file {path}: others may read it; chmod 600 {path}")
        if not (_LEAST_CHARACTERS <= len(value) <= _MOST_CHARACTERS and value.isascii() and value.isprintable()):
            raise UsageError(f"token file {path}: must hold one line of {_LEAST_CHARACTERS} or more printable letters")
        return cls(value)

    def matches(self, given: str | bytes | None) -> bool:
        """Compares in a time that does not depend on where they differ."""
        shown = given.encode() if isinstance(given, str) else given or b""
        return hmac.compare_digest(shown, self.value.encode())
