"""Resources that the owners of requests share: threads and processes for work on texts, and memory of replies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from math import inf
from typing import Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import ParameterError, QueueFullError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sharing.shares import Shares
from llamaclust.core.sharing.turns import Turns
from llamaclust.wire.rpc.deadlines import deadline

current_owner: Final[ContextVar[str]] = ContextVar("owner", default="")
"""The owner of the current task's request: its API key's digest, or its client's address if keys are not needed."""


ignored_parts: Final[ContextVar[list[str] | None]] = ContextVar("ignored_parts", default=None)
"""Names of fields without effect, of the current task's request."""


def report_ignored(names: Iterable[str]) -> None:
    """Adds names for the reply."""
    parts = ignored_parts.get()
    if parts is not None:
        parts += names


_WORK_S = 120.0
"""Deadline of any work, its wait for a thread included: work of seconds takes longer on a busy machine."""

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class Places:
    """Places for one kind of work, which owners take in turns."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Returns a context that holds a place for the current owner."""
        loop = asyncio.get_running_loop()
        if loop not in self._turns:
            self._turns[loop] = Turns(self._count)
        return self._turns[loop].turn(current_owner.get())


class Threads(Places):
    """Places with a thread each."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count)
        self.executor = ThreadPoolExecutor(count, name)


TOKENIZING = Threads(2, "tokenize")
_LONG_TEXTS = Threads(1, "tokenize-long")
_LONG_CHARACTERS = 1 << 16
RENDERING = Threads(1, "derive-format")
BREAKERS = Threads(1, "breakers")
"""A single thread: breakers are computed in Python, and the event loop waits for its turn beside them."""
TEMPLATES = Places(2)
"""Places of processes that render a chat template."""


def tokenizing(characters: int) -> Threads:
    """Returns the threads that tokenize texts of so many characters: long ones one after another, since a tokenizer
    uses up to 150 bytes per character, and short ones beside them."""
    return _LONG_TEXTS if characters > _LONG_CHARACTERS else TOKENIZING


async def run_on(
    threads: Threads,
    function: Callable[_Arguments, _Result],
    *arguments: _Arguments.args,
    **named: _Arguments.kwargs,
) -> _Result:
    """Runs a function on a thread and returns its result. DeadlineError if it is late: work that no thread has taken by
    then does not run."""
    async with deadline("work on the request's text, on a busy machine", _WORK_S), threads.turn():
        work = partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(threads.executor, work)


MAX_REPLY_ENTRIES = 1 << 21
"""Most tokens and top logprobs of one reply."""
UNIT_BYTES = 200
MAX_HELD_UNITS = 1 << 21
"""The most that an owner's replies with logprobs or embeddings take, and prompts that are ranked; all owners together
have at most twice as much, see `fits`."""
_UNIT_NUMBERS = 5
"""Numbers of an embedding, or tokens of prompts, that take a unit."""
_TOP_BYTES = 8
_RETRY_S = 5.0


async def when_free(submit: Callable[[], _Result], limit_s: float = inf) -> _Result:
    """Submits an accepted request, which waits while the queue is full: QueueFullError after so many seconds."""
    clock = asyncio.get_running_loop().time
    end_s = clock() + limit_s
    while True:
        try:
            return submit()
        except QueueFullError as full:
            if clock() > end_s:
                raise
            await asyncio.sleep(full.retry_after_s)


class RowStorage(Enum):
    """The ways in which a reply holds rows."""

    STREAMED = auto()  # the first prompt's are dropped as they come, the others wait
    CHUNKS = auto()
    PACKED = auto()

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes beside its top logprobs."""
        return 40 if self is RowStorage.PACKED else 600


@dataclass(frozen=True, slots=True)
class ReplySize:
    """The most that the completion of one prompt gives."""

    rows: int  # scored and sampled tokens of all choices
    top_logprobs: int  # a row
    has_logprobs: bool  # beside the chosen tokens' own
    storage: RowStorage

    @classmethod
    def of(
        cls, generation: GenerationRequest, choices: int, storage: RowStorage, unread_rows: int | None = None
    ) -> ReplySize:
        """Makes the size; `unread_rows`: most sampled rows that are held, if the answer is read while it runs."""
        first = generation.score_from
        scored = 0 if first is None else max(0, len(generation.prompt) - max(first, 1))
        sampled = choices * generation.max_new_tokens
        if unread_rows is not None:
            sampled = min(sampled, unread_rows)
        top = max(0, min(generation.top_logprobs, MAX_TOP_LOGPROBS))  # validated later
        return cls(choices * scored + sampled, top, top > 0 or scored > 0, storage)

    @property
    def entries(self) -> int:
        return self.rows * (1 + self.top_logprobs)

    @property
    def held_bytes(self) -> int:
        return self.rows * (self.storage.row_bytes + self.top_logprobs * _TOP_BYTES)


class ReplyBudget:
    """The memory that all replies may hold. Plain tokens of an answer count for its own bound alone: few answers are as
    long as they may be."""

    def __init__(self) -> None:
        self.shares = Shares(MAX_HELD_UNITS)

    def reserve(self, sizes: Sequence[ReplySize]) -> AbstractContextManager[None]:
        """Holds a request's memory while the context is open. ParameterError for more than any request may have,
        QueueFullError if the current owner's other requests, or those of all, hold too much at present."""
        rows, top = sum(size.rows for size in sizes), max((size.top_logprobs for size in sizes), default=0)
        units = -(-sum(size.held_bytes for size in sizes if size.has_logprobs) // UNIT_BYTES)
        if (entries := sum(size.entries for size in sizes)) > MAX_REPLY_ENTRIES:
            excess = f"are {entries} entries, at most {MAX_REPLY_ENTRIES} are given in one reply"
        elif units > MAX_HELD_UNITS:
            excess = f"take {_mib(units)} MiB, at most {_mib(MAX_HELD_UNITS)} MiB are held for one reply"
        else:
            return self._take(units)
        advice = "lower max_tokens, n or logprobs, or send fewer prompts at once"
        reason = f"{rows} tokens with {top} top logprobs each {excess}: {advice}"
        raise ParameterError("logprobs" if top else "max_tokens", reason, "reply_too_large")

    def reserve_numbers(self, count: int, param: str, refusal: str) -> AbstractContextManager[None]:
        """Holds the room of numbers of embeddings, or of tokens of prompts that are ranked, while the context is open.
        Errors as of `reserve`; `refusal`: the text of the ParameterError, with {count} and {most}."""
        most = MAX_REPLY_ENTRIES * _UNIT_NUMBERS
        if count > most:
            raise ParameterError(param, refusal.format(count=count, most=most), "reply_too_large")
        return self._take(-(-count // _UNIT_NUMBERS))

    def _take(self, units: int) -> AbstractContextManager[None]:
        owner = current_owner.get()
        if not self.shares.fits(owner, units):
            held = _mib(self.shares.held.total())
            raise QueueFullError(f"replies of up to {held} MiB are under way; try again", _RETRY_S)
        return self.shares.holding(owner, units)


def _mib(units: int) -> int:
    return -(-units * UNIT_BYTES >> 20)
