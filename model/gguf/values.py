"""GGUF metadata in Python: numbers, text, NumPy arrays, and arrays of text that are decoded on first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from struct import Struct
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError

LENGTH = Struct("<Q")


class LazyStrings(Sequence[str]):
    """A metadata array of strings. Before first use, it holds raw bytes, with a 64-bit length before each string."""

    __slots__ = ("_count", "_data", "_decoded", "_origin")

    def __init__(self, data: bytes, count: int, origin: str) -> None:
        self._data = data
        self._count = count
        self._origin = origin
        self._decoded: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.decoded()[index]

    def __repr__(self) -> str:
        return f"LazyStrings({self._origin}, {self._count} strings)"

    def decoded(self) -> list[str]:
        """Returns a cached list of all strings. Callers must not change it. Raises ModelFileError for invalid UTF-8."""
        if self._decoded is not None:
            return self._decoded
        data, unpack = self._data, LENGTH.unpack_from
        words: list[str] = []
        at = 0
        try:
            for _ in range(self._count):
                end = at + 8 + unpack(data, at)[0]
                words.append(str(data[at + 8 : end], "utf-8"))
                at = end
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self._origin}: string {len(words)} is not UTF-8 ({error.reason})") from error
        self._decoded, self._data = words, b""
        return words


MetadataValue = int | float | bool | str | NDArray[Any] | LazyStrings | tuple["MetadataValue", ...]


def text_of(metadata: Mapping[str, MetadataValue], key: str) -> str | None:
    """Returns a metadata value that is text, or None if the key is missing or has another type."""
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def described(value: MetadataValue) -> str:
    """Formats a value of a file's metadata for a one-line message. Arrays may be large, and are not shown."""
    if isinstance(value, int | float | str):
        return shown(str(value))
    kind = f"{value.dtype} " if isinstance(value, np.ndarray) else ""
    return f"an array of {len(value)} {kind}values"


def shown(text: str) -> str:
    """Makes text from a file safe for a one-line message: quotes it, escapes it, and cuts it to 64 characters."""
    return ascii(text if len(text) <= 64 else text[:61] + "...")


def kind_of(value: MetadataValue) -> str:
    if isinstance(value, bool):
        return "a Boolean"
    if isinstance(value, int):
        return "a whole number"
    if isinstance(value, float):
        return "a decimal number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, LazyStrings):
        return "an array of text"
    return "an array of arrays" if isinstance(value, tuple) else f"an array of {value.dtype.name}"


def fail_at(
    path: Path, place: str, what: str, advice: str = "the file is damaged, download it again"
) -> ModelFileError:
    return ModelFileError(f"{path}: {place}: {what}; {advice}")


def padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
