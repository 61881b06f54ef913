"""Threads for work on texts. Each kind of work has its own: it holds up neither another kind nor the rest of the
process, whose default pool stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from llamaclust.wire.rpc.deadlines import deadline

TOKENIZING = ThreadPoolExecutor(2, "tokenize")
RENDERING = ThreadPoolExecutor(1, "derive-format")
BREAKERS = ThreadPoolExecutor(1, "breakers")
"""Few: they compute in Python, one at a time, and the event loop waits for its turn beside them."""
_WORK_S = 120.0
"""Of any work, its wait for a thread included: what takes seconds at most takes longer on a busy machine."""

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


async def run_on(
    threads: Executor,
    function: Callable[_Arguments, _Result],
    *arguments: _Arguments.args,
    **named: _Arguments.kwargs,
) -> _Result:
    """What the function returns or raises. DeadlineError where it is late: what no thread has taken until then
    does not run."""
    async with deadline("work on the request's text, on a busy machine", _WORK_S):
        return await asyncio.get_running_loop().run_in_executor(threads, partial(function, *arguments, **named))
