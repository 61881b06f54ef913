"""Shared secrets: the token of a cluster on one machine, and join tokens in files of mode 0600."""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import decode_text, open_regular

_MOST_CHARACTERS = 1024
_MOST_BYTES = 2 * _MOST_CHARACTERS + 2  # UTF-16 has two bytes for each character, and begins with a mark of two bytes.
_JOIN_TOKEN = re.compile(r"lc1\.([0-9a-f]{64})\.([A-Za-z0-9_-]{32,128})")


@dataclass(frozen=True, slots=True)
class ClusterToken:
    value: str = field(repr=False)

    @classmethod
    def create(cls) -> ClusterToken:
        return cls(secrets.token_urlsafe(32))

    def matches(self, given: str | bytes | None) -> bool:
        shown = given.encode(errors="surrogatepass") if isinstance(given, str) else given or b""
        return self.value != "" and hmac.compare_digest(shown, self.value.encode())


@dataclass(frozen=True, slots=True)
class JoinToken:
    """The CA to trust and the secret for joining. Its text is `lc1.<SHA-256 of the CA certificate, hex>.<secret>`."""

    ca_hash: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def create(cls, ca_hash: bytes) -> JoinToken:
        return cls(ca_hash, secrets.token_urlsafe(32).encode())

    @classmethod
    def read(cls, path: Path) -> JoinToken:
        token = cls.parse(read_private(path))
        if token is None:
            raise UsageError(f"token file {path} holds no join token (lc1.<64 hex digits>.<secret>); copy it again")
        return token

    @classmethod
    def parse(cls, text: str) -> JoinToken | None:
        match = _JOIN_TOKEN.fullmatch(text)
        return match and cls(bytes.fromhex(match[1]), match[2].encode())

    @property
    def text(self) -> str:
        return f"lc1.{self.ca_hash.hex()}.{self.secret.decode()}"


def read_private(path: Path) -> str:
    """Returns a secret file's text, stripped. Raises UsageError if it is unreadable or other users can read it."""
    try:
        with open_regular(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MOST_BYTES + 1)
        value = decode_text(data).strip()
    except OSError as error:
        what = f"token file {path} cannot be read: {error.strerror}"
        raise UsageError(f"{what}; give the path of a readable copy of the file that `llamaclust up` names") from error
    except ValueError as error:
        raise UsageError(f"token file {path}: {error}; copy the file again") from error
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"token file {path} can be read by other users; run: chmod 600 {path}")
    if len(value) > _MOST_CHARACTERS:
        raise UsageError(f"token file {path} is longer than {_MOST_CHARACTERS} characters, so it holds no token")
    return value
