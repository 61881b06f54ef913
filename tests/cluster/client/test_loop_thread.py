"""Tests of a synchronous client's thread: interrupts, errors and ends of coroutines in its event loop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType

import pytest

from llamaclust.cluster.client import base
from llamaclust.cluster.client.base import LoopThread
from llamaclust.core.errors import DeadlineError, LlamaclustError, UsageError

EVENTS: list[str] = []


@asynccontextmanager
async def resource() -> AsyncIterator[str]:
    EVENTS.append("opened")
    yield "resource"
    EVENTS.append("closed")


@pytest.fixture
def thread() -> Iterator[LoopThread[str]]:
    EVENTS.clear()
    opened = LoopThread(resource)
    yield opened
    opened.close()
    assert EVENTS[0] == "opened" and EVENTS[-1] == "closed"


def interrupt_main_thread() -> None:
    """Interrupts the main thread once it waits for the other thread's result."""
    main = threading.main_thread().ident
    assert main is not None and main != threading.get_ident()
    while not _waits(sys._current_frames()[main]):
        time.sleep(0)
    signal.pthread_kill(main, signal.SIGINT)
    for _ in range(50):  # A signal that comes just before a thread waits for a lock is handled only at the next one.
        time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGUSR1)


@pytest.fixture(autouse=True, scope="module")
def _sigusr1_does_nothing() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)


def _waits(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not Future.result.__code__:
        frame = frame.f_back
    return frame is not None


async def numbers(interrupted_at: int) -> AsyncGenerator[int, None]:
    try:
        for number in range(1, 100):
            if number == interrupted_at:
                interrupt_main_thread()
                await asyncio.Event().wait()
            yield number
    finally:
        for _ in range(20):  # like the cancellation of a request at its server
            await asyncio.sleep(0)
        EVENTS.append("ended")


@pytest.mark.parametrize("at", [1, 2, 7])
def test_an_interrupt_ends_the_values_before_it_is_raised(thread: LoopThread[str], at: int) -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen += thread.each(numbers(at))
    assert EVENTS == ["opened", "ended"]
    assert list(thread.each(numbers(1000))) == [*range(1, 100)]


def test_an_interrupted_call_is_cancelled(thread: LoopThread[str]) -> None:
    cancelled = threading.Event()

    async def work() -> None:
        interrupt_main_thread()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        thread.call(work)
    assert cancelled.wait(60)


def test_an_interrupt_before_a_call_begins_leaves_no_coroutine_that_nobody_awaits(
    thread: LoopThread[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    async def work() -> None: ...

    def making() -> Coroutine[None, None, None]:
        made.append(threading.current_thread().name)
        return work()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(thread._loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            thread.call(making)
    assert made == []
    thread.call(making)
    assert made == ["client"]


def test_an_interrupt_while_it_opens_ends_the_thread() -> None:
    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        interrupt_main_thread()
        await asyncio.sleep(60)
        yield

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        LoopThread(slow)
    assert set(threading.enumerate()) <= before


def test_what_opening_raises_is_raised() -> None:
    @asynccontextmanager
    async def refused() -> AsyncIterator[None]:
        raise UsageError("no such file")
        yield

    with pytest.raises(UsageError, match="no such file"):
        LoopThread(refused)


def test_what_hangs_is_ended(thread: LoopThread[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def hanging() -> AsyncGenerator[int, None]:
        try:
            await asyncio.sleep(20)
            yield 1
        finally:
            EVENTS.append("ended")

    monkeypatch.setattr(base, "_CALL_S", 0.01)
    with pytest.raises(DeadlineError, match=r"the answer to a call of the client took longer than 0\.01 s"):
        thread.call(partial(asyncio.sleep, 20))
    with pytest.raises(DeadlineError):
        list(thread.each(hanging()))
    assert EVENTS == ["opened", "ended"]


def test_what_hangs_while_it_opens_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def hanging() -> AsyncIterator[None]:
        await asyncio.sleep(20)
        yield

    monkeypatch.setattr(base, "_OPEN_S", 0.01)
    before = set(threading.enumerate())
    with pytest.raises(DeadlineError, match=r"opening the client took longer than 0\.01 s"):
        LoopThread(hanging)
    assert set(threading.enumerate()) <= before


def test_closing_ends_values_that_nobody_reads_before_the_resource(thread: LoopThread[str]) -> None:
    streams = [thread.each(numbers(1000)) for _ in range(3)]
    assert [next(values) for values in streams] == [1, 1, 1]
    thread.close()
    assert EVENTS == ["opened", "ended", "ended", "ended", "closed"]
    for values in streams:
        with pytest.raises(LlamaclustError, match="closed"):
            next(values)


def test_closing_ends_a_step_that_runs_before_the_resource(thread: LoopThread[str]) -> None:
    begun, raised = threading.Event(), []

    async def waiting() -> AsyncGenerator[int, None]:
        try:
            begun.set()
            await asyncio.Event().wait()
            yield 1
        finally:
            await asyncio.sleep(0)
            EVENTS.append("ended")

    def read() -> None:
        try:
            list(thread.each(waiting()))
        except LlamaclustError as error:
            raised.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    thread.close()
    reader.join(60)
    assert EVENTS == ["opened", "ended", "closed"] and raised == ["the client is closed"]


def test_a_stream_may_be_closed_while_another_thread_reads_it(thread: LoopThread[str]) -> None:
    begun, read = threading.Event(), list[int]()

    async def waiting() -> AsyncGenerator[int, None]:
        try:
            yield 1
            begun.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(20):
                await asyncio.sleep(0)
            EVENTS.append("ended")

    values = thread.each(waiting())
    reader = threading.Thread(target=lambda: read.extend(values))
    reader.start()
    assert begun.wait(60)
    values.close()
    assert EVENTS == ["opened", "ended"]
    reader.join(60)
    assert read == [1] and next(values, None) is None
    assert list(thread.each(numbers(1000))) == [*range(1, 100)]


FORKED = """
import asyncio, os, signal
from contextlib import asynccontextmanager
from functools import partial
from llamaclust.cluster.client.base import LoopThread
from llamaclust.core.errors import LlamaclustError

@asynccontextmanager
async def resource():
    yield "resource"

thread = LoopThread(resource)
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        thread.call(partial(asyncio.sleep, 0))
    except LlamaclustError as error:
        os._exit(7 if "make one in each process" in str(error) else 1)
    finally:
        os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
thread.call(partial(asyncio.sleep, 0))
thread.close()
"""


def test_a_call_in_a_forked_process_is_refused() -> None:
    """Runs in a process without gRPC, whose handlers of forks can abort the child."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)
