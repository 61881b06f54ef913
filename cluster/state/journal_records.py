"""Records of the journal, each a line: a CRC-32, the kind of record and its fields as JSON; and the requests that they
make up.

A torn or damaged line is skipped, and with it the tokens that follow its own.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from struct import Struct
from typing import Annotated, Any, BinaryIO, get_args

from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter

from llamaclust.core.errors import RequestError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.regular_file import open_regular
from llamaclust.core.sampling import RowResult
from llamaclust.core.this_machine import boot_s, machine_id

_MAX_LINE_BYTES = 64 << 20
"""More than the largest body needs; of a longer line, which is none of ours, no more is held."""
_ROW = Struct("<id")
"""A token and its logprob: a journal of many tokens is read several times as fast as one of decimal numbers."""
_CHECKSUM = b"%08x "
_BASE64 = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

ChoiceKey = tuple[int, int]
"""Prompt and choice of a request."""
_Messages = Annotated[Sequence[Mapping[str, Any]], PlainSerializer(json.dumps), BeforeValidator(json.loads)]
"""JSON within JSON: texts may have halves of surrogate pairs, which Pydantic refuses."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A point in time that later processes measure from, by two clocks: the time since the machine started, which is
    never set, and Unix time for other machines."""

    unix_s: float
    boot_s: float
    machine: str  # see `machine_id`; another one after each start of the machine

    @classmethod
    def now(cls) -> Instant:
        return cls(time.time(), boot_s(), machine_id())

    def passed_s(self, until: Instant) -> float:
        """Between machines, at least 0: their clocks may differ."""
        if self.machine == until.machine:
            return until.boot_s - self.boot_s
        return max(0.0, until.unix_s - self.unix_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestIdentity:
    """What a request's reply is called, and what makes it the same when it is computed again."""

    id: str
    seed: int  # where the body has none
    created: int  # Unix time in seconds, part of replies
    owner: str = ""  # digest of the API key, others may not read the reply; "": no key was needed
    client: str = ""  # its share of the machine is used: digest of the API key, or an address where keys are not needed
    conversation: str = ""  # llama.cpp's X-Conversation-Id: names its newest reply
    idempotency_key: str = ""
    scales: AdapterScales = ()  # where the body chooses no adapters
    traceparent: str = ""  # trace context of its spans; "": it is not traced
    tracestate: str = ""  # which belongs to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request as it was accepted."""

    identity: RequestIdentity
    endpoint: str  # path of the POST
    body: bytes
    admitted: Instant
    limit_s: float  # from then on; it ends unanswered
    served: str = ""  # digest of what else answers depend on: the model and its settings
    is_streamed: bool = True
    is_background: bool = False  # its client does not wait for it
    has_measurements: bool = False  # its stream has other bytes if it is computed again
    has_grammar: bool = False  # its answers obey a grammar
    earlier: _Messages = ()  # messages of the stored chat that its body continues
    adapters: tuple[str, ...] = ()  # marks of the adapters that clients had loaded

    __pydantic_config__ = _BASE64

    @property
    def id(self) -> str:
        return self.identity.id

    def left_s(self, now: Instant) -> float:
        """Until it ends unanswered."""
        return self.limit_s - self.admitted.passed_s(now)


@dataclass(frozen=True, slots=True)
class Change:
    """What has become of an admitted request: tokens of one of its choices came, or another part of it is new."""

    id: str
    prompt: int = 0
    choice: int = 0
    start: int = 0  # the number of the first of the tokens
    rows: bytes = b""
    restores: int | None = None  # coordinators began to compute it again, so many times without a new token
    is_sent: bool = False  # the whole reply was; its client may not have read it
    is_ended: bool = False  # it needs no record any more

    __pydantic_config__ = _BASE64

    @classmethod
    def answered(cls, request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> Change:
        """Tokens of a choice, from its token number `start` on."""
        return cls(request_id, *choice, start, b"".join(_ROW.pack(row.token, row.logprob) for row in rows))


Record = Admission | Change
_KINDS: dict[bytes, TypeAdapter[Any]] = {kind.__name__.encode(): TypeAdapter(kind) for kind in get_args(Record)}


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request of the journal that has not ended, and the tokens of its choices so far."""

    admission: Admission
    answered: Mapping[ChoiceKey, tuple[RowResult, ...]] = field(default_factory=dict)
    is_sent: bool = False  # the whole reply was; its client may not have read it
    restores: int = 0  # by coordinators that ended before they added a token

    def records(self) -> Iterator[Record]:
        """Its admission, its tokens and its restores."""
        yield self.admission
        for choice, rows in self.answered.items():
            yield Change.answered(self.admission.id, choice, 0, rows)
        if self.restores:
            yield Change(self.admission.id, restores=self.restores)


def to_line(record: Record) -> bytes:
    """RequestError for a record that no coordinator would read again."""
    kind = type(record).__name__.encode()
    line = _line(kind + b" " + _KINDS[kind].dump_json(record, exclude_defaults=True))
    if len(line) >= _MAX_LINE_BYTES:  # a line of just this length would be read as one that is longer
        what = f"the request, with the chat that it continues, takes {len(line)} bytes in the journal"
        raise RequestError(f"{what}, at most {_MAX_LINE_BYTES - 1} are possible: send less at once")
    return line


def _line(text: bytes) -> bytes:
    return _CHECKSUM % zlib.crc32(text) + text + b"\n"


_HEAD = b"llamaclust journal 3"
HEAD_LINE = _line(_HEAD)
"""The first line of a journal that is not empty: the version of its records."""


def read_journal(path: Path, now: Instant) -> list[OpenRequest]:
    """The requests that an earlier coordinator left and that are not too old, in the order of their admission; empty
    where there is no journal. OSError where it cannot be read, ValueError for one of another version."""
    admissions: dict[str, Admission] = {}
    changes: dict[str, list[Change]] = {}
    for record in _records(path):
        if isinstance(record, Admission):
            admissions[record.id], changes[record.id] = record, []
        elif record.is_ended:
            admissions.pop(record.id, None)
        elif record.id in admissions:
            changes[record.id].append(record)
    return [_opened(each, changes[each.id]) for each in admissions.values() if each.left_s(now) > 0]


def _opened(admission: Admission, changes: Iterable[Change]) -> OpenRequest:
    rows: defaultdict[ChoiceKey, bytearray] = defaultdict(bytearray)
    is_sent, restores = False, 0
    for change in changes:
        known = rows[change.prompt, change.choice]
        if change.restores is not None:
            restores = change.restores
        elif change.rows and not len(change.rows) % _ROW.size and len(known) == change.start * _ROW.size:
            known += change.rows
            restores = 0
        is_sent |= change.is_sent
    answered = {choice: tuple(starmap(RowResult, _ROW.iter_unpack(known))) for choice, known in rows.items() if known}
    return OpenRequest(admission, answered, is_sent, restores)


def _records(path: Path) -> Iterator[Record]:
    """What is on undamaged lines of this version."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for number, text in enumerate(_texts(file)):
            if number == 0 and text not in (b"", _HEAD):
                raise ValueError("another version of llamaclust wrote it")
            kind, _, fields = text.partition(b" ")
            if kind not in _KINDS:
                continue
            try:
                record: Record = _KINDS[kind].validate_json(fields)
            except (ValueError, TypeError, RecursionError):  # another program wrote the line
                continue
            yield record


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """The text of each line behind its checksum; b"" for a damaged one."""
    while line := file.readline(_MAX_LINE_BYTES):
        text = line[len(_CHECKSUM % 0) :].removesuffix(b"\n")
        is_whole = len(line) < _MAX_LINE_BYTES and line.startswith(_CHECKSUM % zlib.crc32(text))
        yield text if is_whole else b""
        while line and not line.endswith(b"\n"):  # the rest of one that is too long: a client's bytes are no lines
            line = file.readline(_MAX_LINE_BYTES)


def left_unanswered(journal: Path) -> str:
    """One line about the requests that a coordinator has left at its end; "" for none. A journal that cannot be read is
    reported by the next start."""
    try:
        number = _unanswered(read_journal(journal, Instant.now()))
    except (OSError, ValueError):
        return ""
    return f"{_counted(number)} computed again at the next start" if number else ""


def found_unanswered(requests: Sequence[OpenRequest], restored: Sequence[OpenRequest]) -> str:
    """One line about the requests that a start has found, and those of them that it answers; "" for none."""
    number = _unanswered(restored)
    dropped = _unanswered(requests) - number
    lines = [f"{_counted(number)} computed again"] if number else []
    if dropped:
        lines.append(f"{_counted(dropped)} dropped, since the model, its settings or the version have changed")
    return "; ".join(lines)


def _unanswered(requests: Sequence[OpenRequest]) -> int:
    return sum(not request.is_sent for request in requests)


def _counted(requests: int) -> str:
    return "1 unanswered request is" if requests == 1 else f"{requests} unanswered requests are"
