"""Encodes and decodes the journal's records. A line holds a CRC-32, the record's kind, and its fields as JSON. A
damaged line is skipped, and so are later tokens of the same answer."""

from __future__ import annotations

import json
import logging
import time
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from itertools import chain, repeat, starmap
from pathlib import Path
from struct import Struct
from typing import Annotated, Any, BinaryIO, get_args

from pydantic import BeforeValidator, ConfigDict, TypeAdapter

from llamaclust.core.errors import RequestError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.regular_file import open_regular
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.this_machine import boot_s, machine_id

_MAX_LINE_BYTES = 64 << 20
"""Maximum number of bytes of a line. A longer line counts as damaged."""
_ROW = Struct("<id")
"""Binary format of a token id and its logprob."""
_CHECKSUM = b"%08x "
_PART_BYTES = 3 << 15
"""Number of bytes that are encoded by one call of base64. A multiple of 3 needs no padding."""
_BASE64 = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

_log = logging.getLogger(__name__)

ChoiceKey = tuple[int, int]
_Messages = Annotated[Sequence[Mapping[str, Any]], BeforeValidator(json.loads)]
"""Messages, stored as a string of JSON. Pydantic would refuse unpaired surrogates, which messages may contain."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A time that processes can compare: on the same machine by seconds since boot, otherwise by Unix time."""

    unix_s: float
    boot_s: float
    machine: str  # Result of `machine_id`, which changes whenever the machine starts.

    @classmethod
    def now(cls) -> Instant:
        return cls(time.time(), boot_s(), machine_id())

    def passed_s(self, until: Instant) -> float:
        """Returns the seconds from this time to `until`. The result is at least 0 if the times are of two machines."""
        if self.machine == until.machine:
            return until.boot_s - self.boot_s
        return max(0.0, until.unix_s - self.unix_s)


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """An admitted request, with all values that are necessary to compute its reply again."""

    id: str
    seed: int  # Seed to use if the body has none.
    created: int  # Unix time in seconds, which replies include.
    endpoint: str  # Path of the HTTP request.
    owner: str = ""  # Digest of the API key. Clients with other keys cannot read the reply. "" if no key was needed.
    # Client for fair scheduling, which is the digest of its API key, or its address if no key was needed.
    client: str = ""
    conversation: str = ""  # llama.cpp's header X-Conversation-Id. It names the newest reply of a conversation.
    idempotency_key: str = ""
    scales: AdapterScales = ()  # Adapter scales to use if the body chooses no adapters.
    traceparent: str = ""  # Trace context of the request's spans. "" if the request is not traced.
    tracestate: str = ""  # Second part of the trace context.
    body: bytes = b""  # Body of the HTTP request. Only a restored request, or a copy for the journal, has it.
    admitted: Instant = field(default_factory=Instant.now)
    limit_s: float = 0.0  # Seconds from admission until the request ends unanswered.
    served: str = ""  # Digest of the model and its settings, which answers depend on.
    is_streamed: bool = True
    is_background: bool = False  # True if the client does not wait for the reply.
    # True if bytes of the stream depend on measurements such as times, so that they differ if it is computed again.
    has_measurements: bool = False
    has_grammar: bool | None = None  # True if answers obey a grammar. None if this is not decided yet.
    earlier: _Messages = ()  # Messages of the stored chat that the request continues.
    # Marks of the adapters that clients had loaded, as `ServedAdapters.marks` returns them.
    adapters: tuple[str, ...] = ()
    images: Mapping[str, bytes] = field(default_factory=dict)  # Images that were fetched, by URL.
    image_bytes: int = 0  # Total bytes of all images. If there are too many, the journal has neither images nor body.
    received_ns: int = field(default_factory=time.monotonic_ns, init=False, compare=False)
    # True if an earlier coordinator admitted the request.
    is_restored: bool = field(default=False, init=False, compare=False)
    # Computed tokens of each answer.
    answered: dict[ChoiceKey, list[RowResult]] = field(default_factory=dict, init=False)
    # True if the whole reply was sent. The client may not have read all of it.
    is_sent: bool = field(default=False, init=False)
    # Number of coordinators that began to compute the request but added no token.
    restores: int = field(default=0, init=False)

    __pydantic_config__ = _BASE64

    @property
    def is_named(self) -> bool:
        return bool(self.conversation or self.idempotency_key)

    @property
    def is_kept(self) -> bool:
        """True if the reply is kept until its client has read it, within limits on memory."""
        return self.is_named or self.is_background

    @property
    def is_complete(self) -> bool:
        return self.is_background and self.is_sent

    @property
    def age_s(self) -> float:
        return (time.monotonic_ns() - self.received_ns) / 1e9

    def left_s(self, now: Instant) -> float:
        return self.limit_s - self.admitted.passed_s(now)

    def apply(self, change: Change) -> None:
        """Applies a later record of this request. Ignores tokens that do not follow the last known token."""
        self.is_sent = (self.is_sent or change.is_sent) and not change.is_begun
        self.limit_s = change.limit_s or self.limit_s
        choice = change.prompt, change.choice
        if change.restores is not None:
            self.restores = change.restores
        elif change.rows and not len(change.rows) % _ROW.size and len(self.answered.get(choice, ())) == change.start:
            self.answered.setdefault(choice, []).extend(starmap(RowResult, _ROW.iter_unpack(change.rows)))
            self.restores = 0

    def records(self) -> Iterator[Record]:
        yield self
        for choice, rows in self.answered.items():
            yield Change.answered(self.id, choice, 0, rows)
        if self.restores:
            yield Change(self.id, restores=self.restores)


@dataclass(frozen=True, slots=True)
class Change:
    id: str
    prompt: int = 0
    choice: int = 0
    start: int = 0  # Number of tokens that were recorded before `rows`.
    rows: bytes = b""
    restores: int | None = None  # Number of restarts since the last new token. None if unchanged by this record.
    is_sent: bool = False  # True if the whole reply was sent. The client may not have read all of it.
    is_begun: bool = False  # True if the reply is computed again, so that it is no longer one that was sent.
    is_ended: bool = False  # True if the request needs no record any longer.
    limit_s: float = 0.0  # New limit in seconds since admission. 0 if the limit does not change.

    __pydantic_config__ = _BASE64

    @classmethod
    def answered(cls, request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> Change:
        return cls(request_id, *choice, start, b"".join(_ROW.pack(row.token, row.logprob) for row in rows))


Record = RequestContext | Change
_KINDS: dict[bytes, TypeAdapter[Any]] = {kind.__name__.encode(): TypeAdapter(kind) for kind in get_args(Record)}


def to_line(record: Record) -> bytes:
    """Encodes a record as a line. A large field is encoded in several parts, so that other threads can run in between.
    Raises RequestError if the line is too long."""
    kind = type(record).__name__.encode()
    parts = {name: part for name, part in _PARTS.items() if getattr(record, name, None)}
    other = {each.name for each in fields(record) if not each.init} | parts.keys()
    text = _KINDS[kind].dump_json(record, exclude=other, exclude_defaults=True)
    pieces = [kind + b" " + text.removesuffix(b"}")]
    for name, part in parts.items():
        pieces += (b',"%b":' % name.encode(), *part(getattr(record, name)))
    line = _line(*pieces, b"}")
    if len(line) >= _MAX_LINE_BYTES:  # Readers treat a line of this length as too long.
        what = f"the request, with the chat that it continues, takes {len(line)} bytes in the journal"
        raise RequestError(f"{what}, but at most {_MAX_LINE_BYTES - 1} are allowed; send a shorter request")
    return line


def _line(*pieces: bytes) -> bytes:
    checksum = reduce(lambda before, piece: zlib.crc32(piece, before), pieces, 0)
    return b"".join((_CHECKSUM % checksum, *pieces, b"\n"))


def _base64_parts(data: bytes) -> Iterator[bytes]:
    yield b'"'
    for start in range(0, len(data), _PART_BYTES):
        yield urlsafe_b64encode(data[start : start + _PART_BYTES])
    yield b'"'


def _image_parts(images: Mapping[str, bytes]) -> Iterator[bytes]:
    for begin, (url, data) in zip(chain((b"{",), repeat(b",")), images.items(), strict=False):
        yield b"%b%b:" % (begin, json.dumps(url).encode())
        yield from _base64_parts(data)
    yield b"}"


def _message_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    for begin, message in zip(chain(('"[',), repeat(",")), messages, strict=False):
        text = json.dumps(message).replace("\\", "\\\\").replace('"', '\\"')
        yield (begin + text).encode()
    yield b']"'


_PARTS: dict[str, Callable[[Any], Iterator[bytes]]] = {
    "body": _base64_parts,
    "images": _image_parts,
    "earlier": _message_parts,
}


_HEAD = b"llamaclust journal 4"
HEAD_LINE = _line(_HEAD)
"""First line of every journal that is not empty. It holds the version of the record format."""


def read_journal(path: Path, now: Instant) -> list[RequestContext]:
    """Returns the open requests whose time limit has not passed. Raises OSError if the file cannot be read, and
    ValueError if another version of llamaclust wrote it."""
    requests: dict[str, RequestContext] = {}
    for record in _records(path):
        if isinstance(record, RequestContext):
            record.is_restored = True
            requests[record.id] = record
        elif record.is_ended:
            requests.pop(record.id, None)
        elif (request := requests.get(record.id)) is not None:
            request.apply(record)
    return [request for request in requests.values() if request.left_s(now) > 0]


def _records(path: Path) -> Iterator[Record]:
    damaged, number = [], 0  # Numbers of the damaged lines, and number of the last line.
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for number, text in enumerate(_texts(file), 1):
            if number == 1 and text not in (b"", _HEAD):
                raise ValueError("another version of llamaclust wrote it")
            if (record := _record(text)) is not None:
                yield record
            elif text != _HEAD:
                damaged.append(number)
    if inner := [line for line in damaged if line < number]:
        _log.warning("%s: %d damaged lines were skipped; the first of them is line %d", path, len(inner), inner[0])


def _record(text: bytes) -> Record | None:
    kind, _, fields = text.partition(b" ")
    try:
        return _KINDS[kind].validate_json(fields) if kind in _KINDS else None
    except (ValueError, TypeError, RecursionError):
        return None


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """Yields each line without its checksum, or b"" for a damaged line."""
    while line := file.readline(_MAX_LINE_BYTES):
        text = line[len(_CHECKSUM % 0) :].removesuffix(b"\n")
        is_whole = len(line) < _MAX_LINE_BYTES and line.startswith(_CHECKSUM % zlib.crc32(text))
        yield text if is_whole else b""
        # The rest of a line that is too long is skipped. Its bytes come from a client and must not be read as a line.
        while line and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE_BYTES)


def left_unanswered(journal: Path) -> str:
    try:
        number = _unanswered(read_journal(journal, Instant.now()))
    except (OSError, ValueError):
        return ""
    return f"{_counted(number)} computed again at the next start" if number else ""


def has_unanswered(path: Path) -> bool:
    """Returns True if the journal has requests that a coordinator accepted and did not answer completely."""
    try:
        return _unanswered(read_journal(path, Instant.now())) > 0
    except (OSError, ValueError, TypeError, KeyError):  # The journal is reported as unreadable when it is restored.
        return False


def found_unanswered(requests: Sequence[RequestContext], restored: Sequence[RequestContext]) -> str:
    number = _unanswered(restored)
    dropped = _unanswered(requests) - number
    lines = [f"{_counted(number)} computed again"] if number else []
    if dropped:
        lines.append(f"{_counted(dropped)} dropped, because the model, its settings or the version have changed")
    return "; ".join(lines)


def _unanswered(requests: Sequence[RequestContext]) -> int:
    return sum(not request.is_sent for request in requests)


def _counted(requests: int) -> str:
    return "1 unanswered request is" if requests == 1 else f"{requests} unanswered requests are"
