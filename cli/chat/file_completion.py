"""Completes the names of files after `@` in a typed line."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from llamaclust.cluster.config.values import expand_home

_MARK: Final = "@"
_MOST_NAMES: Final = 1000


def completed_file(word: str, number: int) -> str | None:
    """Returns the completion of `word` at index `number`, or None if `word` has fewer completions."""
    if number == 0:
        _completions.cache_clear()
    found = _completions(word) if word.startswith(_MARK) else ()
    return found[number] if number < len(found) else None


@lru_cache(maxsize=1)
def _completions(word: str) -> tuple[str, ...]:
    folder, slash, start = word.removeprefix(_MARK).rpartition("/")
    found: list[str] = []
    with suppress(OSError, ValueError):
        for path in Path(expand_home(folder + slash) if slash else ".").iterdir():
            is_seen = path.name.startswith(start) and (start or not path.name.startswith("."))
            if is_seen and not any(character.isspace() for character in path.name):
                found.append(f"{_MARK}{folder}{slash}{path.name}{'/' if path.is_dir() else ''}")
    return tuple(sorted(found)[:_MOST_NAMES])
