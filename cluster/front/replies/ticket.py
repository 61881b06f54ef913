"""A request's ticket: its identity, what is known of its answer, and its tokens on their way into the journal."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from starlette.datastructures import Headers

from llamaclust.cluster.engine.trace_context import current_trace
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.security import owner
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import Subscriber
from llamaclust.cluster.front.text.request import CompletionRequest, draw_seed
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import ChoiceKey, RequestIdentity
from llamaclust.core.errors import WorkerError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling import RowResult

_MAX_NAME = 255


@dataclass(slots=True)
class Constraint:
    """Whether the answers of a request obey a grammar. The first computation decides it, for the calls of a chat by the
    processor time that their grammar takes; later ones, on which other tokens would depend, have no choice."""

    is_used: bool | None = None  # None: not decided yet

    def kept(self, request: CompletionRequest) -> CompletionRequest:
        """WorkerError where its grammar could not be made again."""
        has_grammar = request.grammar is not None
        if self.is_used is None:
            self.is_used = has_grammar
        if self.is_used and not has_grammar:
            raise WorkerError("the grammar of this request's calls could not be made in time again; send it anew")
        if self.is_used or not has_grammar:
            return request
        reasoning = request.reasoning
        if reasoning is not None:  # only a budget is left to follow
            reasoning = None if reasoning.budget is None else replace(reasoning, delays_grammar=False)
        return replace(request, grammar=None, reasoning=reasoning)


@dataclass(slots=True)
class EarlierChat:
    """The messages of the stored chat that a request continues. Its first computation reads them from the store; later
    ones, whose store may lack them, have them from the journal."""

    messages: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Of one request, drawn at its admission or read from the journal."""

    identity: RequestIdentity
    answered: Mapping[ChoiceKey, tuple[RowResult, ...]] = field(default_factory=dict)
    journal: Journal | None = None
    restoration: Restoration | None = None  # of a request that an earlier coordinator admitted
    constraint: Constraint = field(default_factory=Constraint)
    earlier: EarlierChat = field(default_factory=EarlierChat)
    adapters: set[int] = field(default_factory=set)  # numbers of those that its prompts are computed with
    received_ns: int = field(default_factory=time.monotonic_ns)

    @classmethod
    def draw(
        cls, headers: Headers, api_keys: Sequence[str], *, journal: Journal | None, scales: AdapterScales
    ) -> Ticket:
        """Of a new request; `scales` of adapters, if it chooses none. HttpError for a header that cannot be a name."""
        trace = current_trace.get()
        identity = RequestIdentity(
            id=secrets.token_hex(12),
            seed=draw_seed(),
            created=int(time.time()),
            owner=owner(headers, api_keys),
            client=current_owner.get(),
            conversation=_name(headers, "x-conversation-id"),
            idempotency_key=_name(headers, "idempotency-key"),
            scales=scales,
            traceparent="" if trace is None else trace.traceparent,
            tracestate="" if trace is None else trace.state,
        )
        return cls(identity=identity, journal=journal)

    @property
    def id(self) -> str:
        return self.identity.id

    @property
    def created(self) -> int:
        return self.identity.created

    @property
    def scales(self) -> AdapterScales:
        """Of adapters, if the request chooses none."""
        return self.identity.scales

    @property
    def is_kept(self) -> bool:
        """Whether the client may be cut off and come back."""
        return bool(self.identity.conversation or self.identity.idempotency_key)

    def request(self, prompt: int, request: CompletionRequest) -> CompletionRequest:
        """The completion of one of its prompts, with its seed and the tokens that are known."""
        answered = {choice: rows for (of, choice), rows in self.answered.items() if of == prompt}
        seed = self.identity.seed if request.seed is None else request.seed
        name = self.id if prompt == 0 else f"{self.id}-p{prompt}"
        return self.constraint.kept(request.identified(name, self.id, seed, answered, received_ns=self.received_ns))

    def recording(self, requests: Sequence[CompletionRequest]) -> Subscriber | None:
        """Takes the tokens of its prompts' answers into the journal, where tokens are all that they need to go on."""
        if self.journal is None:
            return None
        if any(request.top_logprobs or request.score_from is not None for request in requests) or any(
            request.params.needs_state for request in requests
        ):
            return None if self.restoration is None else self.restoration.sampled
        known = {choice: len(rows) for choice, rows in self.answered.items()}
        return Recording(self.journal, self.id, known, self.restoration).add


def _name(headers: Headers, header: str) -> str:
    name = headers.get(header, "")
    if len(name) > _MAX_NAME or not name.isprintable() or not name.isascii():
        raise HttpError(400, "bad_header", f"{header}: must be 1 to {_MAX_NAME} printable ASCII characters")
    return name


_RECORDED_ROWS = 64
_RECORDED_S = 1.0
"""The oldest row that is not recorded waits no longer, once another one comes: of slow streams, too, a successor
computes little again."""


class Restoration:
    """The computation of a request that an earlier coordinator admitted: it has progressed once a token was added.
    `adapters`: marks of those that clients had loaded and it used."""

    def __init__(self, journal: Journal, request_id: str, adapters: Sequence[str] = ()) -> None:
        self.adapters = frozenset(adapters)
        self._journal = journal
        self._id = request_id
        self._has_progressed = asyncio.Event()

    def sampled(self, prompt: int, chunk: TextChunk) -> None:
        """A chunk of an answer of which nothing was known before."""
        if chunk.rows:
            self.progress()

    def progress(self) -> None:
        """A token came that was not known before."""
        if not self._has_progressed.is_set():
            self._has_progressed.set()
            self._journal.progressed(self._id)

    async def progressed(self) -> None:
        await self._has_progressed.wait()


class Recording:
    """The tokens of a request's choices, recorded some at a time: of a restored request the first ones sooner, so that
    it gets further in a coordinator's short life. A subscriber of its log."""

    def __init__(
        self, journal: Journal, request_id: str, known: Mapping[ChoiceKey, int], restoration: Restoration | None
    ) -> None:
        """`known`: how many tokens of each choice are recorded already."""
        self._journal = journal
        self._id = request_id
        self._restoration = restoration
        self._starts = dict(known)
        self._skipped = dict(known)
        self._most = _RECORDED_ROWS if restoration is None else 1
        self._rows: dict[ChoiceKey, list[RowResult]] = {}
        self._oldest_s = 0.0  # of these rows

    def add(self, prompt: int, chunk: TextChunk) -> None:
        """The next tokens of a choice, from its first one on."""
        choice, new = (prompt, chunk.index), chunk.rows
        if self._skipped.get(choice):
            new = new[self._skipped[choice] :]
            self._skipped[choice] -= len(chunk.rows) - len(new)
        if not new:
            return
        if self._restoration is not None:
            self._restoration.progress()
        now_s = monotonic()
        if not self._rows:
            self._oldest_s = now_s
        rows = self._rows.setdefault(choice, [])
        rows += new
        if len(rows) >= self._most or now_s - self._oldest_s >= _RECORDED_S:
            self._most = min(2 * self._most, _RECORDED_ROWS)
            self._write()

    def _write(self) -> None:
        for choice, rows in self._rows.items():
            start = self._starts.get(choice, 0)
            self._journal.answer(self._id, choice, start, rows)
            self._starts[choice] = start + len(rows)
        self._rows.clear()
