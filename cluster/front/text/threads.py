"""Threads for work on texts in turns by owner, and what belongs to the request that a task works for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from functools import partial
from typing import Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from llamaclust.core.sharing.turns import Turns
from llamaclust.wire.rpc.deadlines import deadline

current_owner: Final[ContextVar[str]] = ContextVar("owner", default="")
"""Of the request that a task works for: its API key's digest, or its client's address where keys are not needed."""


ignored_parts: Final[ContextVar[list[str] | None]] = ContextVar("ignored_parts", default=None)
"""Their names, of the request that a task answers."""


def report_ignored(names: Iterable[str]) -> None:
    """The reply will name them."""
    parts = ignored_parts.get()
    if parts is not None:
        parts += names


_WORK_S = 120.0
"""Of any work, its wait for a thread included: what takes seconds at most takes longer on a busy machine."""

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class Places:
    """Places for one kind of work, which owners take in turns."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()

    def turn(self) -> AbstractAsyncContextManager[None]:
        """A place for the current owner while it is open."""
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
"""Few: they compute in Python, one at a time, and the event loop waits for its turn beside them."""
TEMPLATES = Places(2)
"""Processes that render a chat template."""


def tokenizing(characters: int) -> Threads:
    """The threads that tokenize texts of so many characters: long ones one after another, since a tokenizer uses up to
    150 bytes for a character, and short ones beside them."""
    return _LONG_TEXTS if characters > _LONG_CHARACTERS else TOKENIZING


async def run_on(
    threads: Threads,
    function: Callable[_Arguments, _Result],
    *arguments: _Arguments.args,
    **named: _Arguments.kwargs,
) -> _Result:
    """What the function returns or raises. DeadlineError where it is late: what no thread has taken until then
    does not run."""
    async with deadline("work on the request's text, on a busy machine", _WORK_S), threads.turn():
        work = partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(threads.executor, work)
