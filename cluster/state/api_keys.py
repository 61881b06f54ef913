"""Reads the HTTP API's key file. Adds and removes keys by name."""

from __future__ import annotations

import logging
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamaclust.cluster.state.file_lock import folder_locked
from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import file_version, read_text, write_text

FILE_NAME = "api-keys"
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_MOST_KEY_BYTES = 1 << 20
_RANDOM_BYTES = 24
_LOCK_S = 10.0  # The folder is locked, because a change replaces the file.
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedKey:
    """An API key in lines [start, end) of the key file. Its name is the comment in these lines, or else its number."""

    name: str
    key: str = field(repr=False)
    start: int
    end: int


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """Reads the keys of a file. Raises UsageError if the file is invalid or other users can read it."""
    if path is None:
        return ()
    keys = _keys_of(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UsageError(f"{path}: other users can read these API keys (mode {mode:04o}); run: chmod 600 {path}")
    bad = next((number for number, key in enumerate(keys, 1) if not _KEY.fullmatch(key)), None)
    if bad is not None:
        raise UsageError(f"{path}: key {bad} must be 8 to 512 printable ASCII characters without spaces")
    return tuple(keys)


class LiveKeys(Sequence[str]):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = file_version(path)
        self._keys = read_api_keys(path)

    def _current(self) -> tuple[str, ...]:
        version = file_version(self._path)
        if version != self._version:
            self._version = version
            try:
                self._keys = read_api_keys(self._path)
                _log.info("%s: API keys were read again: %d", self._path, len(self._keys))
            except UsageError as error:
                _log.warning("%s; the previous API keys stay valid", error)
        return self._keys

    def __getitem__(self, index: Any) -> Any:
        return self._current()[index]

    def __len__(self) -> int:
        return len(self._current())

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())


def first_key(path: Path) -> str:
    return _keys_of(path)[0]


def named_keys(path: Path) -> list[NamedKey]:
    return _named(_lines_of(path)) if path.exists() else []


def add_key(path: Path, name: str | None = None) -> NamedKey:
    """Adds a new random key to the file, and creates the file if necessary. Raises UsageError if the name is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_locked(path.resolve().parent, _LOCK_S):
        lines = _lines_of(path) if path.exists() else []
        keys = _named(lines)
        names = {each.name for each in keys}
        if name in names:
            raise UsageError(f"{path} has a key named {name}; choose another name, or run `llamaclust keys rm {name}`")
        chosen = name or next(each for each in (f"key-{n}" for n in range(1, len(keys) + 2)) if each not in names)
        # If a comment has this name but no key follows it, it is removed.
        lines = [line for line in lines if not line.startswith("#") or line.lstrip("# ") != chosen]
        added = NamedKey(chosen, f"lc-{secrets.token_urlsafe(_RANDOM_BYTES)}", len(lines), len(lines) + 2)
        _write(path, [*lines, f"# {chosen}", added.key])
    return added


def remove_key(path: Path, name: str) -> None:
    with folder_locked(path.resolve().parent, _LOCK_S):
        lines = _lines_of(path)
        keys = _named(lines)
        names = ", ".join(each.name for each in keys) or "none"
        found = next((each for each in keys if each.name == name), None)
        if found is None:
            raise UsageError(f"{path} has no key named {name}; its keys: {names}")
        if len(keys) == 1:
            raise UsageError(f"{path}: {name} is the only key; add another key first, or delete the file")
        _write(path, [*lines[: found.start], *lines[found.end :]])


def _write(path: Path, lines: list[str]) -> None:
    write_text(path.resolve(), "".join(f"{line}\n" for line in lines))


def _named(lines: list[str]) -> list[NamedKey]:
    keys: list[NamedKey] = []
    for number, line in enumerate(lines):
        if not line or line.startswith("#"):
            continue
        above = lines[number - 1] if number else ""
        name = above.lstrip("# ") if above.startswith("#") else ""
        keys.append(NamedKey(name or str(len(keys) + 1), line, number - bool(name), number + 1))
    return keys


def _keys_of(path: Path) -> list[str]:
    keys = [each.key for each in _named(_lines_of(path))]
    if not keys:
        raise UsageError(f"{path} has no API key; write one key per line")
    return keys


def _lines_of(path: Path) -> list[str]:
    try:
        if not path.exists():
            raise UsageError(
                f"{path}: cannot read the API keys: no such file; make one: llamaclust keys add --file {path}"
            )
        if not path.is_file():
            raise UsageError(f"{path}: cannot read the API keys: not a regular file")
        return [line.strip() for line in read_text(path, _MOST_KEY_BYTES).splitlines()]
    except OSError as error:
        raise UsageError(f"{path}: cannot read the API keys: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: cannot read the API keys: {error}") from error
