"""Resources that the owners of requests share fairly: threads and processes for texts, and memory for replies."""

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
"""Owner of the current task's request: the digest of its API key, or the client's address if there is no key."""

hold_bytes: Final[ContextVar[Callable[[int], None] | None]] = ContextVar("hold_bytes", default=None)
"""A function that counts more bytes for the current request, or raises an error. None outside HTTP requests."""

ignored_parts: Final[ContextVar[list[str] | None]] = ContextVar("ignored_parts", default=None)
"""Names of the fields that have no effect in the current task's request."""


def report_ignored(names: Iterable[str]) -> None:
    parts = ignored_parts.get()
    if parts is not None:
        parts += names


_WORK_S = 120.0
"""Maximum seconds for work on a thread, including the wait for a thread."""

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class Places:
    """Limits concurrent tasks to `count`, and one owner's tasks to `most` (None: no limit). Owners take turns."""

    def __init__(self, count: int, most: int | None = None) -> None:
        self._count = count
        self._most = most
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()

    def turn(self) -> AbstractAsyncContextManager[None]:
        loop = asyncio.get_running_loop()
        if loop not in self._turns:
            self._turns[loop] = Turns(self._count, self._most)
        return self._turns[loop].turn(current_owner.get())


class Threads(Places):
    def __init__(self, count: int, name: str) -> None:
        super().__init__(count)
        self.executor = ThreadPoolExecutor(count, name)


TOKENIZING = Threads(2, "tokenize")
_LONG_TEXTS = Threads(1, "tokenize-long")
_LONG_CHARACTERS = 1 << 16
RENDERING = Threads(1, "derive-format")
BREAKERS = Threads(1, "breakers")
"""Thread for DRY's sequence breakers."""
TEMPLATES = Places(2)


def tokenizing(characters: int) -> Threads:
    """Returns the threads for tokenizing a text. Long texts are tokenized one at a time."""
    # Tokenizing takes up to 150 bytes of memory per character.
    return _LONG_TEXTS if characters > _LONG_CHARACTERS else TOKENIZING


async def run_on(
    threads: Threads,
    function: Callable[_Arguments, _Result],
    *arguments: _Arguments.args,
    **named: _Arguments.kwargs,
) -> _Result:
    """Runs a function on a thread. Raises DeadlineError after `_WORK_S` seconds."""
    async with deadline("work on the request's text, on a busy machine", _WORK_S), threads.turn():
        work = partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(threads.executor, work)


MAX_REPLY_ENTRIES = 1 << 21
"""Maximum number of tokens and top logprobs in one reply."""
UNIT_BYTES = 200
MAX_HELD_UNITS = 1 << 21
"""Memory limit of one owner's replies and reranking prompts, in `UNIT_BYTES`. All owners together get twice as much."""
_UNIT_NUMBERS = 5
"""Number of embedding values, or of tokens in reranking prompts, that count as one unit of memory."""
_TOP_BYTES = 8
_RETRY_S = 5.0


async def when_free(submit: Callable[[], _Result], limit_s: float = inf) -> _Result:
    """Calls `submit`, and tries again while the queue is full. Raises QueueFullError after `limit_s`."""
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
    STREAMED = auto()  # Rows of the current prompt are dropped when they are read. Rows of later prompts wait.
    CHUNKS = auto()
    PACKED = auto()

    @property
    def row_bytes(self) -> int:
        return 40 if self is RowStorage.PACKED else 600


@dataclass(frozen=True, slots=True)
class ReplySize:
    """Upper bound on the size of the answers to one prompt."""

    rows: int  # Number of scored and sampled tokens of all choices.
    top_logprobs: int  # Number of top logprobs in each row.
    has_logprobs: bool  # True if there are top logprobs or scored tokens.
    storage: RowStorage

    @classmethod
    def of(
        cls, generation: GenerationRequest, choices: int, storage: RowStorage, unread_rows: int | None = None
    ) -> ReplySize:
        """`unread_rows` is the maximum number of sampled tokens held in memory at a time. None means all of them."""
        first = generation.score_from
        scored = 0 if first is None else max(0, len(generation.prompt) - max(first, 1))
        sampled = choices * generation.max_new_tokens
        if unread_rows is not None:
            sampled = min(sampled, unread_rows)
        top = max(0, min(generation.top_logprobs, MAX_TOP_LOGPROBS))  # The engine validates the number later.
        return cls(choices * scored + sampled, top, top > 0 or scored > 0, storage)

    @property
    def entries(self) -> int:
        return self.rows * (1 + self.top_logprobs)

    @property
    def held_bytes(self) -> int:
        return self.rows * (self.storage.row_bytes + self.top_logprobs * _TOP_BYTES)


class ReplyBudget:
    """Limits the memory of replies."""

    def __init__(self) -> None:
        self.shares = Shares(MAX_HELD_UNITS)

    def reserve(self, sizes: Sequence[ReplySize]) -> AbstractContextManager[None]:
        """Returns a context that reserves memory. Raises ParameterError or QueueFullError."""
        rows, top = sum(size.rows for size in sizes), max((size.top_logprobs for size in sizes), default=0)
        units = -(-sum(size.held_bytes for size in sizes if size.has_logprobs) // UNIT_BYTES)
        if (entries := sum(size.entries for size in sizes)) > MAX_REPLY_ENTRIES:
            excess = f"are {entries} entries, but the limit of a reply is {MAX_REPLY_ENTRIES}"
        elif units > MAX_HELD_UNITS:
            excess = f"take {_mib(units)} MiB, but the limit of a reply is {_mib(MAX_HELD_UNITS)} MiB"
        else:
            return self._take(units)
        advice = "lower max_tokens, n or logprobs, or send fewer prompts at once"
        reason = f"{rows} tokens with {top} top logprobs each {excess}: {advice}"
        raise ParameterError("logprobs" if top else "max_tokens", reason, "reply_too_large")

    def reserve_numbers(self, count: int, param: str, refusal: str) -> AbstractContextManager[None]:
        """Returns a context that reserves memory for `count` numbers. `refusal` is the error if `count` is too high."""
        most = MAX_REPLY_ENTRIES * _UNIT_NUMBERS
        if count > most:
            raise ParameterError(param, refusal.format(count=count, most=most), "reply_too_large")
        return self._take(-(-count // _UNIT_NUMBERS))

    def _take(self, units: int) -> AbstractContextManager[None]:
        owner = current_owner.get()
        if not self.shares.fits(owner, units):
            held = _mib(self.shares.held.total())
            raise QueueFullError(f"too little memory is left: running replies reserve {held} MiB; try again", _RETRY_S)
        return self.shares.holding(owner, units)


def _mib(units: int) -> int:
    return -(-units * UNIT_BYTES >> 20)
