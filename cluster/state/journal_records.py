"""Requests as the journal has them, and its lines: JSON behind its CRC-32; an admission's body follows as it is.

A torn or damaged line is skipped, and with it the tokens that follow its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

from pydantic_core import from_json

from llamaclust.cluster.state.instants import Instant
from llamaclust.core.errors import RequestError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.regular_file import open_regular
from llamaclust.core.sampling import RowResult

_MAX_LINE_BYTES = 64 << 20
"""More than the largest body needs; of a longer line, which is none of ours, no more is held."""
_CHECKSUM_DIGITS = 8
_BODY = b"\t"
"""Before a body; JSON of ours has none."""
_ADMISSION = [
    str,
    int,
    int,
    str,
    str,
    str,
    str,
    str,
    str,
    str,
    float,
    float,
    str,
    float,
    str,
    bool,
    bool,
    bool,
    list,
    list,
    list,
]
"""Types of its fields, in the order of `admission_line`."""
_ROW = Struct("<id")
"""A token and its logprob, in hexadecimal digits on a line: a journal of many tokens is read several times as fast as
one of decimal numbers."""
_encoder = json.JSONEncoder(separators=(",", ":"))
"""One for all lines: to make one takes as long as a line."""

ChoiceKey = tuple[int, int]
"""Prompt and choice of a request."""


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
    has_grammar: bool = False  # its answers obey a grammar
    earlier: Sequence[Mapping[str, Any]] = ()  # messages of the stored chat that its body continues
    adapters: tuple[str, ...] = ()  # marks of the adapters that clients had loaded

    @property
    def id(self) -> str:
        return self.identity.id

    def left_s(self, now: Instant) -> float:
        """Until it ends unanswered."""
        return self.limit_s - self.admitted.passed_s(now)


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request of the journal that has not ended, and the tokens of its choices so far."""

    admission: Admission
    answered: Mapping[ChoiceKey, tuple[RowResult, ...]] = field(default_factory=dict)
    is_sent: bool = False  # the whole reply was; its client may not have read it
    restores: int = 0  # by coordinators that ended before they added a token


def admission_line(admission: Admission) -> bytes:
    """RequestError for one that no coordinator would read again."""
    identity = admission.identity
    fields = (
        identity.id,
        identity.seed,
        identity.created,
        identity.owner,
        identity.client,
        identity.conversation,
        identity.idempotency_key,
        identity.traceparent,
        identity.tracestate,
        admission.endpoint,
        admission.admitted.unix_s,
        admission.admitted.boot_s,
        admission.admitted.machine,
        admission.limit_s,
        admission.served,
        admission.is_streamed,
        admission.is_background,
        admission.has_grammar,
        admission.earlier,
        identity.scales,
        admission.adapters,
    )
    body = admission.body.replace(b"%", b"%25").replace(b"\n", b"%0A")
    line = _line(_json({"admit": fields}) + _BODY + body)
    if len(line) >= _MAX_LINE_BYTES:  # a line of just this length would be read as one that is longer
        what = f"the request, with the chat that it continues, takes {len(line)} bytes in the journal"
        raise RequestError(f"{what}, at most {_MAX_LINE_BYTES - 1} are possible: send less at once")
    return line


def answer_line(request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> bytes:
    packed = b"".join(_ROW.pack(row.token, row.logprob) for row in rows)
    return _line(_json({"answer": request_id, "choice": choice, "after": start, "rows": packed.hex()}))


def restores_line(request_id: str, restores: int) -> bytes:
    return _line(_json({"restored": request_id, "times": restores}))


def sent_line(request_id: str) -> bytes:
    return _line(_json({"sent": request_id}))


def end_line(request_ids: Sequence[str]) -> bytes:
    return _line(_json({"end": request_ids}))


def _json(record: Mapping[str, Any]) -> bytes:
    return _encoder.encode(record).encode()


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: Path, now: Instant) -> list[OpenRequest]:
    """The requests that an earlier coordinator left and that are not too old, in the order of their admission; empty
    where there is no journal. OSError where it cannot be read."""
    requests: dict[str, _Request] = {}
    for record, body in _records(path):
        try:
            _apply(record, body, requests)
        except (TypeError, KeyError, ValueError, OverflowError):  # a line that another program or version wrote
            continue
    return [request.as_open() for request in requests.values() if request.admission.left_s(now) > 0]


def _apply(record: Any, body: bytes, requests: dict[str, _Request]) -> None:
    """What one line changes. TypeError, KeyError, ValueError or OverflowError for one that is none of ours, which
    changes nothing."""
    kind = next(iter(record), None)
    if kind == "answer":  # most lines
        if (request := requests.get(record[kind])) is not None:
            request.answer(record["choice"], record["after"], record["rows"])
    elif kind == "admit":
        admission = _admission(record[kind], body)
        requests[admission.id] = _Request(admission)
    elif kind == "restored":
        if (request := requests.get(record[kind])) is not None:
            request.restores = int(record["times"])
    elif kind == "sent":
        if (request := requests.get(record[kind])) is not None:
            request.is_sent = True
    elif kind == "end":
        for request_id in set(record[kind]):
            requests.pop(request_id, None)


@dataclass(slots=True)
class _Request:
    """One that is read."""

    admission: Admission
    answered: dict[ChoiceKey, bytearray] = field(default_factory=dict)  # rows of each choice
    is_sent: bool = False
    restores: int = 0

    def answer(self, choice: Sequence[Any], start: int, rows: str) -> None:
        prompt, index = choice
        key, more = (int(prompt), int(index)), bytes.fromhex(rows)
        if len(more) % _ROW.size:
            raise ValueError("a part of a row")
        if start * _ROW.size == len(self.answered.get(key, b"")):
            self.answered.setdefault(key, bytearray()).extend(more)
            self.restores = 0

    def as_open(self) -> OpenRequest:
        answered = {choice: tuple(starmap(RowResult, _ROW.iter_unpack(rows))) for choice, rows in self.answered.items()}
        return OpenRequest(self.admission, answered, self.is_sent, self.restores)


def _admission(fields: Sequence[Any], body: bytes) -> Admission:
    if [type(value) for value in fields] != _ADMISSION:
        raise TypeError("other fields than those of an admission")
    request_id, seed, created, owner, client, conversation, idempotency_key, traceparent, tracestate, *more = fields
    endpoint, unix_s, boot_s, machine, limit_s, served, is_streamed, is_background, has_grammar, *last = more
    earlier, scales, adapters = last
    identity = RequestIdentity(
        id=request_id,
        seed=seed,
        created=created,
        owner=owner,
        client=client,
        conversation=conversation,
        idempotency_key=idempotency_key,
        scales=tuple((int(number), float(scale)) for number, scale in scales),
        traceparent=traceparent,
        tracestate=tracestate,
    )
    body = body.replace(b"%0A", b"\n").replace(b"%25", b"%")
    return Admission(
        identity=identity,
        endpoint=endpoint,
        body=body,
        admitted=Instant(unix_s, boot_s, machine),
        limit_s=limit_s,
        served=served,
        is_streamed=is_streamed,
        is_background=is_background,
        has_grammar=has_grammar,
        earlier=tuple(earlier),
        adapters=tuple(map(str, adapters)),
    )


def _records(path: Path) -> Iterable[tuple[Any, bytes]]:
    """What is on whole lines, with the body that follows."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES:
                _skip_line(file, line)
                continue
            text = line[_CHECKSUM_DIGITS + 1 :].removesuffix(b"\n")
            try:
                if int(line[:_CHECKSUM_DIGITS], 16) != zlib.crc32(text):
                    continue
                record, _, body = text.partition(_BODY)
                value = from_json(record)
            except ValueError:
                continue
            yield value, body


def _skip_line(file: BinaryIO, part: bytes) -> None:
    """The rest of a line that is too long: a client's bytes, which are no lines."""
    while part and not part.endswith(b"\n"):
        part = file.readline(_MAX_LINE_BYTES)
