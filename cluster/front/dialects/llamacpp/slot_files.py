"""Files that llama.cpp's clients save slots in: a line of JSON, the token ids, and a SHA-256 of both. KV memory is not
in them: it is computed again, or read from the workers' disks."""

from __future__ import annotations

import json
import os
import re
import sys
from array import array
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from llamaclust.cluster.front.text.slots import SlotTokens
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_CONTEXT_TOKENS
from llamaclust.core.regular_file import open_regular, read_bytes, write_bytes

_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_FORMAT: Final = "llamaclust slot 1"
_BEGINNING: Final = b'{"format": "llamaclust slot '
_MOST_BYTES: Final = 4 * MAX_CONTEXT_TOKENS + (1 << 20)
_DIGEST_BYTES: Final = 32
_TOKEN_BYTES: Final = 4
_FIELDS: Final = frozenset({"format", "model", "cache_salt", "adapters", "tokens"})
_MOST_FILES: Final = 1024
"""In the folder: a client that saves under ever new names does not fill the disk."""


@dataclass(frozen=True, slots=True)
class SlotFile:
    """What was written or read."""

    tokens: SlotTokens
    size_bytes: int


class SlotFolder:
    """The slot files of one folder, of all models. Calls block: use them on a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, tokens: SlotTokens, model_id: str) -> SlotFile:
        """Replaces a slot file of this name. ParameterError for a name that is none or that something else has, and
        where there are too many files; OSError."""
        path = self._path(name)
        if os.path.lexists(path):
            if not _is_slot_file(path):
                raise ParameterError("filename", f"{name!r} is there and cannot be replaced: it is no slot file")
        elif (files := sum(1 for _ in self._folder.iterdir())) >= _MOST_FILES:
            raise ParameterError("filename", f"there are {files} files, at most {_MOST_FILES} are kept; delete some")
        data = _encode(tokens, model_id)
        write_bytes(path, data)
        return SlotFile(tokens, len(data))

    def read(self, name: str, model_id: str) -> SlotFile:
        """ParameterError where there is no file of this name that this model can use; OSError."""
        path = self._path(name)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ParameterError("filename", f"{name!r} cannot be restored: it is no regular file")
        try:
            data = read_bytes(path, _MOST_BYTES, follows_links=False)
            return SlotFile(_decode(data, model_id), len(data))
        except FileNotFoundError as error:
            raise ParameterError("filename", f"there is no file {name!r}") from error
        except ValueError as error:
            raise ParameterError("filename", f"{name!r} cannot be restored: {error}") from error

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            reason = "must be 1 to 128 letters, digits, dots, hyphens and underscores that do not begin with a dot"
            raise ParameterError("filename", reason)
        return self._folder / name


def _is_slot_file(path: Path) -> bool:
    """By its beginning: the rest may be damaged. OSError."""
    if path.is_symlink() or not path.is_file():
        return False
    with open_regular(path, follows_links=False) as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def _encode(tokens: SlotTokens, model_id: str) -> bytes:
    head = {
        "format": _FORMAT,
        "model": model_id,
        "cache_salt": tokens.cache_salt,
        "adapters": tokens.adapters,
        "tokens": len(tokens.tokens),
    }
    data = json.dumps(head).encode() + b"\n" + _little_endian(tokens.tokens).tobytes()
    return data + sha256(data).digest()


def _decode(data: bytes, model_id: str) -> SlotTokens:
    """ValueError for what `_encode` has not made, or for another model."""
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    head, _, ids = content.partition(b"\n")
    if sha256(content).digest() != digest or not head.startswith(_BEGINNING):
        raise ValueError("it is damaged, or not a slot file of this program")
    fields: dict[str, Any] = json.loads(head)
    if fields.get("format") != _FORMAT:
        raise ValueError(f"it has another format than {_FORMAT!r}")
    if fields.get("model") != model_id:
        raise ValueError("another model has saved it")
    if not ids or len(ids) % _TOKEN_BYTES or fields.keys() != _FIELDS or fields["tokens"] != len(ids) // _TOKEN_BYTES:
        raise ValueError("it lacks fields or tokens, or has further ones")
    tokens = array("I")
    tokens.frombytes(ids)
    try:
        adapters = tuple((int(number), float(scale)) for number, scale in fields["adapters"])
    except TypeError:
        raise ValueError("its adapters are no pairs of numbers") from None
    return SlotTokens(_little_endian(tokens), str(fields["cache_salt"]), adapters)


def _little_endian(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens
