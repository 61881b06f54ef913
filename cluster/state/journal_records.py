"""Encodes and decodes the journal's records. A line has a CRC-32, the record's kind, and its fields as JSON. If a line
is damaged, the line and its choice's later tokens are skipped."""

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
from llamaclust.core.sampling import RowResult
from llamaclust.core.this_machine import boot_s, machine_id

_MAX_LINE_BYTES = 64 << 20
"""Maximum bytes of a line. The largest body needs less. Only this much of a damaged line is held in memory."""
_ROW = Struct("<id")
"""Binary format of a token and its logprob. Decimal numbers would take several times as long to read."""
_CHECKSUM = b"%08x "
_PART_BYTES = 3 << 15
"""Bytes to encode at a time, while other threads cannot run. They must be a multiple of 3."""
_BASE64 = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

_log = logging.getLogger(__name__)

ChoiceKey = tuple[int, int]
_Messages = Annotated[Sequence[Mapping[str, Any]], BeforeValidator(json.loads)]
"""Messages as JSON inside JSON. They may have halves of surrogate pairs, which Pydantic refuses."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A time that other processes can compare. They use the time since boot, or Unix time on another machine."""

    unix_s: float
    boot_s: float
    machine: str  # see `machine_id`; another one after each start of the machine

    @classmethod
    def now(cls) -> Instant:
        return cls(time.time(), boot_s(), machine_id())

    def passed_s(self, until: Instant) -> float:
        """Returns the seconds from this time to `until`. Between machines, whose clocks may differ, at least 0."""
        if self.machine == until.machine:
            return until.boot_s - self.boot_s
        return max(0.0, until.unix_s - self.unix_s)


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """An admitted request, with all values that are necessary to compute its reply again."""

    id: str
    seed: int  # where the body has none
    created: int  # Unix time in seconds, part of replies
    endpoint: str  # path of the POST
    owner: str = ""  # digest of the API key, others may not read the reply; "": no key was needed
    client: str = ""  # its share of the machine is used: digest of the API key, or an address where keys are not needed
    conversation: str = ""  # llama.cpp's X-Conversation-Id: names its newest reply
    idempotency_key: str = ""
    scales: AdapterScales = ()  # where the body chooses no adapters
    traceparent: str = ""  # trace context of its spans; "": it is not traced
    tracestate: str = ""  # which belongs to it
    body: bytes = b""  # known to the journal alone
    admitted: Instant = field(default_factory=Instant.now)
    limit_s: float = 0.0  # from then on; it ends unanswered
    served: str = ""  # digest of what else answers depend on: the model and its settings
    is_streamed: bool = True
    is_background: bool = False  # its client does not wait for it
    has_measurements: bool = False  # its stream has other bytes if it is computed again
    has_grammar: bool | None = None  # its answers obey a grammar; None: that is not decided yet
    earlier: _Messages = ()  # messages of the stored chat that the request continues
    adapters: tuple[str, ...] = ()  # marks of the adapters that clients had loaded
    images: Mapping[str, bytes] = field(default_factory=dict)  # that were fetched, by their URLs
    image_bytes: int = 0  # of all images; if they are too many, the journal has neither images nor body
    received_ns: int = field(default_factory=time.monotonic_ns, init=False, compare=False)
    is_restored: bool = field(default=False, init=False, compare=False)  # an earlier coordinator left it
    answered: dict[ChoiceKey, list[RowResult]] = field(default_factory=dict, init=False)  # tokens of choices so far
    is_sent: bool = field(default=False, init=False)  # the whole reply was; its client may not have read it
    restores: int = field(default=0, init=False)  # by coordinators that ended before they added a token

    __pydantic_config__ = _BASE64

    @property
    def is_named(self) -> bool:
        return bool(self.conversation or self.idempotency_key)

    @property
    def is_complete(self) -> bool:
        """True if this is a background request whose whole reply was computed, even if the client has not read it."""
        return self.is_background and self.is_sent

    @property
    def age_s(self) -> float:
        return (time.monotonic_ns() - self.received_ns) / 1e9

    def left_s(self, now: Instant) -> float:
        return self.limit_s - self.admitted.passed_s(now)

    def apply(self, change: Change) -> None:
        """Applies a later record. Skips tokens that do not continue the known tokens."""
        self.is_sent |= change.is_sent
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
    start: int = 0  # the number of the first of the tokens
    rows: bytes = b""
    restores: int | None = None  # coordinators began to compute it again, so many times without a new token
    is_sent: bool = False  # the whole reply was; its client may not have read it
    is_ended: bool = False  # it needs no record any more
    limit_s: float = 0.0  # a new limit, since its admission; 0: the one of before

    __pydantic_config__ = _BASE64

    @classmethod
    def answered(cls, request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> Change:
        return cls(request_id, *choice, start, b"".join(_ROW.pack(row.token, row.logprob) for row in rows))


Record = RequestContext | Change
_KINDS: dict[bytes, TypeAdapter[Any]] = {kind.__name__.encode(): TypeAdapter(kind) for kind in get_args(Record)}


def to_line(record: Record) -> bytes:
    """Encodes a record as a line. Large fields are encoded in parts, so that other threads can run in between. Raises
    RequestError if the line is too long."""
    kind = type(record).__name__.encode()
    parts = {name: part for name, part in _PARTS.items() if getattr(record, name, None)}
    other = {each.name for each in fields(record) if not each.init} | parts.keys()
    text = _KINDS[kind].dump_json(record, exclude=other, exclude_defaults=True)
    pieces = [kind + b" " + text.removesuffix(b"}")]
    for name, part in parts.items():
        pieces += (b',"%b":' % name.encode(), *part(getattr(record, name)))
    line = _line(*pieces, b"}")
    if len(line) >= _MAX_LINE_BYTES:  # a line of just this length would be read as one that is longer
        what = f"the request, with the chat that it continues, takes {len(line)} bytes in the journal"
        raise RequestError(f"{what}, at most {_MAX_LINE_BYTES - 1} are possible: send less at once")
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
"""Encoders of fields that may be large. They yield JSON in parts."""


_HEAD = b"llamaclust journal 4"
HEAD_LINE = _line(_HEAD)
"""First line of each journal that is not empty. It has the version of the record format."""


def read_journal(path: Path, now: Instant) -> list[RequestContext]:
    """Returns the open requests whose limit has not passed. Raises OSError, or ValueError for another version."""
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
    """Yields the records of undamaged lines. Logs how many lines are damaged, except for an incomplete last line."""
    damaged, number = [], 0  # numbers of lines
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
        _log.warning("%s: %d damaged lines are skipped, the first is line %d", path, len(inner), inner[0])


def _record(text: bytes) -> Record | None:
    kind, _, fields = text.partition(b" ")
    try:
        return _KINDS[kind].validate_json(fields) if kind in _KINDS else None
    except (ValueError, TypeError, RecursionError):
        return None


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """Yields each line's text without the checksum. Yields an empty text for a damaged line."""
    while line := file.readline(_MAX_LINE_BYTES):
        text = line[len(_CHECKSUM % 0) :].removesuffix(b"\n")
        is_whole = len(line) < _MAX_LINE_BYTES and line.startswith(_CHECKSUM % zlib.crc32(text))
        yield text if is_whole else b""
        while line and not line.endswith(b"\n"):  # the rest of one that is too long: a client's bytes are no lines
            line = file.readline(_MAX_LINE_BYTES)


def left_unanswered(journal: Path) -> str:
    """Describes the requests that a coordinator leaves unanswered. Returns an empty text if there are none."""
    try:
        number = _unanswered(read_journal(journal, Instant.now()))
    except (OSError, ValueError):
        return ""
    return f"{_counted(number)} computed again at the next start" if number else ""


def found_unanswered(requests: Sequence[RequestContext], restored: Sequence[RequestContext]) -> str:
    """Describes the requests that a start computes again or drops. Returns an empty text if there are none."""
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
