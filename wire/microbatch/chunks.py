"""Chunks as bytes. Those of decode, of which a microbatch may have hundreds, are made without protobuf's objects, which
would take most of the time; what repeats from token to token, a block table until it grows, is encoded once."""

from __future__ import annotations

from llamaclust.proto import microbatch_pb2 as microbatch_proto
from llamaclust.wire.microbatch.fields import packed, sized, varint
from llamaclust.wire.microbatch.messages import Chunk

_KEPT_NUMBERS = 1 << 18
"""Of tables whose encodings are kept, which take about 10 MB with the tables themselves."""
_ENTRY_NUMBERS = 8
"""What a kept table takes beside its numbers, in numbers."""


def chunk_bytes(chunk: Chunk) -> bytes:
    """As a part of a microbatch: with the field's tag."""
    return b"\x22" + sized(_one_row(chunk) if _is_one_row(chunk) else _any(chunk))


def _is_one_row(chunk: Chunk) -> bool:
    """Whether it is one known row of the usual kind."""
    if len(chunk.tokens) != 1 or chunk.depends_on is not None or chunk.state_to or chunk.state_from is not None:
        return False
    has_more = chunk.window_table or chunk.window_start or chunk.adapters or chunk.drafts or chunk.embedded != (0, 0)
    return not has_more and chunk.next_token is None and not chunk.checked


def _one_row(chunk: Chunk) -> bytes:
    position = b"\x10" + varint(chunk.position) if chunk.position else b""
    outputs = b"\x20" + varint(chunk.outputs) if chunk.outputs else b""
    return b"".join((b"\x0a", sized(varint(chunk.tokens[0])), position, _tables.encoded(chunk.table), outputs))


class _Tables:
    """Encodings of block tables. Those of the last tables are kept, by numbers in all: where sequences have taken the
    memory in turns, one table may have thousands."""

    def __init__(self, kept_numbers: int) -> None:
        self._most = kept_numbers // 2
        self._numbers = 0  # in the newer ones
        self._newer: dict[tuple[int, ...], bytes] = {}
        self._older: dict[tuple[int, ...], bytes] = {}

    def encoded(self, table: tuple[int, ...]) -> bytes:
        found = self._newer.get(table)
        return self._keep(table) if found is None else found

    def _keep(self, table: tuple[int, ...]) -> bytes:
        if (found := self._older.get(table)) is None:
            found = b"\x1a" + packed(table) if table else b""
        size = len(table) + _ENTRY_NUMBERS
        if self._numbers + size > self._most:
            self._newer, self._older, self._numbers = {}, self._newer, 0
        self._newer[table] = found
        self._numbers += size
        return found


_tables = _Tables(_KEPT_NUMBERS)


def _any(chunk: Chunk) -> bytes:
    message = microbatch_proto.Chunk(
        tokens=chunk.tokens,
        position=chunk.position,
        table=chunk.table,
        outputs=chunk.outputs,
        window_table=chunk.window_table,
        window_start=chunk.window_start,
        embedded_first=chunk.embedded[0],
        embedded_end=chunk.embedded[1],
        adapters=[microbatch_proto.AdapterScale(adapter=number, scale=scale) for number, scale in chunk.adapters],
        state_from=chunk.state_from,
        state_to=chunk.state_to,
        next_token=chunk.next_token,
        drafts=chunk.drafts,
        checked=chunk.checked,
    )
    if chunk.depends_on is not None:
        message.depends_on.number, message.depends_on.row = chunk.depends_on
    return message.SerializeToString()
