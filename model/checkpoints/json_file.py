"""Reads JSON objects from untrusted files, with limits on their size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.core.regular_file import decode_text
from llamaclust.model.gguf.tensors import FileIdentity, open_regular, read_exactly
from llamaclust.model.gguf.values import shown

_MAX_JSON_BYTES: Final = 1 << 27
_MAX_DIGITS: Final = 4000


def read_json(path: Path) -> dict[str, Any]:
    with open_regular(path) as descriptor:
        size = FileIdentity.of(descriptor).size_bytes
        if size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: the file has {size >> 20} MiB; the limit is {_MAX_JSON_BYTES >> 20} MiB")
        buffer = bytearray(size)
        read_exactly(descriptor, path, 0, memoryview(buffer))
    return parse_json(bytes(buffer), str(path))


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """Parses a JSON object. Refuses duplicate keys. NaN and infinity become floats, so callers must check for them."""
    try:
        found = json.loads(decode_text(data), object_pairs_hook=_object, parse_constant=float, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ModelFileError(f"{origin}: the JSON cannot be read: {what[:120]}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{origin}: expected a JSON object, found {type(found).__name__}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for (key, count) in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; the limit is {_MAX_DIGITS}")
    return int(digits)
