"""Reads a GGUF header front to back in growing chunks; every length is checked against the file before it is used."""

from __future__ import annotations

from pathlib import Path
from struct import Struct

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.tensors import read_exactly
from llamaclust.model.gguf.values import LENGTH, LazyStrings, fail_at, shown

MAX_HEADER_BYTES = 1 << 28
_FIRST_CHUNK_BYTES = 1 << 16
_MAX_STRINGS = 1 << 22

_U32 = Struct("<I")


class HeaderCursor:
    """A position in a file's header. `place` names the part that is read now, for errors."""

    __slots__ = ("_buffer", "_descriptor", "_path", "_size_bytes", "place", "position")

    def __init__(self, descriptor: int, path: Path, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._path = path
        self._size_bytes = size_bytes
        self._buffer = bytearray()
        self.place = "header"
        self.position = 0

    @property
    def consumed(self) -> memoryview:
        """The bytes read so far, [0, position)."""
        return memoryview(self._buffer)[: self.position]

    @property
    def remaining_bytes(self) -> int:
        return self._size_bytes - self.position

    def error(self, what: str, advice: str = "the file is damaged, download it again") -> ModelFileError:
        return fail_at(self._path, f"{self.place} (byte {self.position})", what, advice)

    def need(self, count: int) -> None:
        """Makes the next `count` bytes ready; ModelFileError where there are fewer, or absurdly many."""
        end = self.position + count
        if end <= len(self._buffer):
            return
        if end > self._size_bytes:
            raise self.error(f"{count} bytes needed, the file ends at byte {self._size_bytes}")
        if end > MAX_HEADER_BYTES:
            raise self.error(f"the header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        have = len(self._buffer)
        wanted = min(self._size_bytes, MAX_HEADER_BYTES, max(end, 2 * have, _FIRST_CHUNK_BYTES))
        chunk = bytearray(wanted - have)
        read_exactly(self._descriptor, self._path, have, memoryview(chunk))
        self._buffer += chunk

    def take(self, count: int) -> bytes:
        self.need(count)
        start = self.position
        self.position = start + count
        return bytes(memoryview(self._buffer)[start : self.position])

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = LENGTH.unpack(self.take(8))[0]
        return value

    def string(self, max_bytes: int) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.u64()
        if length > max_bytes:
            raise self.error(f"a string of {length} bytes, at most {max_bytes} allowed")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a string that is not UTF-8 ({error.reason})") from error

    def strings(self, count: int, key: str) -> LazyStrings:
        """`count` strings, of which only the lengths are looked at."""
        if count > min(_MAX_STRINGS, self.remaining_bytes // 8):
            raise self.error(f"an array of {count} strings")
        start = self.position
        self._skip_strings(count)
        return LazyStrings(bytes(memoryview(self._buffer)[start : self.position]), count, f"{self._path}: {shown(key)}")

    def _skip_strings(self, count: int) -> None:
        buffer, unpack = self._buffer, LENGTH.unpack_from
        at, ready = self.position, len(buffer)
        for _ in range(count):
            if at + 8 > ready:
                self.need(at + 8 - self.position)
                ready = len(buffer)
            at += 8 + unpack(buffer, at)[0]
        self.need(at - self.position)
        self.position = at
