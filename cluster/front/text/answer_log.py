"""The log of a request's answers, in the order of its prompts. It can be read while it grows or later."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum, auto
from operator import itemgetter
from typing import Self

from llamaclust.cluster.front.text.answer import Collected, TextChunk
from llamaclust.cluster.front.text.sharing import RowStorage
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptProgress
from llamaclust.core.errors import DeadlineError, LlamaclustError

MAX_UNREAD_ROWS = 4096
"""Maximum number of unread tokens in a streamed log."""

LogItem = TextChunk | PromptProgress
Entry = tuple[int, LogItem]
Subscriber = Callable[[int, TextChunk], None]
"""A callback for appended chunks, with the prompt's index and the chunk. An error that it raises ends the log."""


class Timed(Enum):
    """Selects the chunks that get timings. The last chunk of a choice always gets timings."""

    NEVER = auto()
    FIRST = auto()
    ALWAYS = auto()


@dataclass(frozen=True, slots=True)
class LogContent:
    storage: RowStorage
    timed: Timed = Timed.NEVER
    with_progress: bool = False  # True if the log reports the progress of prompts.


@dataclass(frozen=True, slots=True)
class _PromptEnd:
    error: BaseException | None


class AnswerLog:
    """A log of the answers to several prompts. The first prompt's answers come first, even if others end earlier."""

    def __init__(self, *subscribers: Subscriber, is_held: bool = False) -> None:
        """Makes a log. If `is_held` is true, readers get nothing until `release` is called."""
        self.generations: Sequence[GenerationRequest] = ()  # One for each prompt.
        self.content = LogContent(RowStorage.CHUNKS)
        self.error: BaseException | None = None
        self.ended_s: float | None = None  # Unix time of the end. None while more items may come.
        self._is_packed = self._lets_go = False
        self._is_held = is_held
        self._entries: deque[Entry] = deque()
        self._first = 0  # Number of the first entry in `_entries`.
        self._prompt = 0  # Index of the prompt whose items become entries now.
        self._later: dict[int, list[LogItem | _PromptEnd]] = {}  # Items of later prompts.
        # Keys: prompt index, choice index.
        self._packed: defaultdict[tuple[int, int], Collected] = defaultdict(Collected)
        self._unread_rows = 0
        self._most_unread_rows: int | None = None  # No limit until a reader begins.
        self._owners = subscribers
        self._subscribers = [*subscribers]
        self.readers: set[LogReader] = set()  # Readers to wake when an entry arrives.
        self._over = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.ended_s is not None

    def begin(self, generations: Sequence[GenerationRequest], content: LogContent) -> None:
        """Starts the log of these prompts. Drops all entries of an earlier attempt."""
        self.clear()
        self.generations = [replace(each, images=()) if each.images else each for each in generations]
        self.content = content
        self._is_packed = content.storage is RowStorage.PACKED
        self._lets_go = content.storage is RowStorage.STREAMED
        self._first = self._prompt = self._unread_rows = 0
        self._subscribers = [*self._owners]
        if not generations:
            self._finish(None)

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.append(subscriber)

    def append(self, prompt: int, item: LogItem) -> None:
        """Appends an item and calls the subscribers. Raises their errors, and DeadlineError if readers are too slow."""
        if self.ended_s is not None:
            return
        if isinstance(item, TextChunk):
            for subscriber in self._subscribers:
                subscriber(prompt, item)
            if self._is_packed:
                self._packed[prompt, item.index].add(item)
                return
        self._put(prompt, item)

    def end(self, prompt: int, error: BaseException | None = None) -> None:
        """Ends the answers to a prompt. If `error` is given, the log ends after the entries of this prompt."""
        if self.ended_s is None:
            self._put(prompt, _PromptEnd(error))

    def fail(self, error: BaseException) -> None:
        self.release()
        self._finish(error)

    def release(self) -> None:
        self._is_held = False
        self._wake()

    def clear(self) -> None:
        self.generations = ()
        self._first += len(self._entries)
        self._entries.clear()
        self._later.clear()
        self._packed.clear()

    def parts(self) -> list[list[TextChunk]]:
        """Returns the chunks of each prompt's answers. Raises the error that ended the log, if any."""
        self.raise_error()
        parts: list[list[TextChunk]] = [[] for _ in self.generations]
        for (prompt, _), collected in sorted(self._packed.items(), key=itemgetter(0)):
            parts[prompt].append(collected.answer())
        for prompt, item in self._entries:
            if isinstance(item, TextChunk):
                parts[prompt].append(item)
        return parts

    async def chunks(self) -> AsyncGenerator[TextChunk, None]:
        with LogReader(self) as reader:
            while not reader.is_at_end:
                if (entry := reader.take()) is None:
                    await reader.wait()
                elif isinstance(entry[1], TextChunk):
                    yield entry[1]
        self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:  # Raising the stored error itself would keep the frames of its traceback in memory.
            raise copy(self.error) if isinstance(self.error, LlamaclustError) else self.error

    async def wait_over(self) -> None:
        await self._over.wait()

    async def first(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` for the first chunk. If the log ends without a chunk, raises the log's error."""
        with LogReader(self) as reader:
            end_s = asyncio.get_running_loop().time() + timeout_s
            while not self.is_over and not any(isinstance(item, TextChunk) for _, item in self._entries):
                if (left_s := end_s - asyncio.get_running_loop().time()) <= 0 or not await reader.wait(left_s):
                    return
        if not any(isinstance(item, TextChunk) for _, item in self._entries):
            self.raise_error()

    def _put(self, prompt: int, item: LogItem | _PromptEnd) -> None:
        if prompt != self._prompt and not self._is_packed:
            self._later.setdefault(prompt, []).append(item)
            return
        if isinstance(item, _PromptEnd):
            self._end_prompt(item)
            return
        if self._lets_go:
            self._unread_rows += _rows(item)
            if self._most_unread_rows is not None and self._unread_rows > self._most_unread_rows:
                waited = f"{self._unread_rows} tokens were waiting to be read"
                raise DeadlineError(f"the answer was read too slowly: {waited}")
        self._entries.append((prompt, item))
        for reader in self.readers:
            reader.wake()

    def _end_prompt(self, end: _PromptEnd) -> None:
        self._prompt += 1
        if end.error is not None or self._prompt == len(self.generations):
            self._finish(end.error)
            return
        most, self._most_unread_rows = self._most_unread_rows, None
        for item in self._later.pop(self._prompt, ()):
            self._put(self._prompt, item)
        if most is not None:
            self._most_unread_rows = self._unread_rows + MAX_UNREAD_ROWS

    def _finish(self, error: BaseException | None) -> None:
        if self.ended_s is None:
            self.error, self.ended_s = error, time.time()
            self._owners, self._subscribers = (), []  # Breaks a reference cycle: the owner refers to this object.
            self._over.set()
            self._wake()

    # -- called by readers ---------------------------------------------------------------------------------------------

    def enter(self, reader: LogReader) -> None:
        self.readers.add(reader)
        if self._most_unread_rows is None:
            self._most_unread_rows = self._unread_rows + MAX_UNREAD_ROWS

    def entry(self, number: int) -> Entry | None:
        """Returns the entry with this number, or None if there is none. A streamed log drops the returned entry."""
        place = number - self._first
        if not 0 <= place < len(self._entries) or self._is_held:
            return None
        if not self._lets_go:
            return self._entries[place]
        entry = self._entries.popleft()
        self._first += 1
        self._unread_rows -= _rows(entry[1])
        return entry

    def is_end(self, number: int) -> bool:
        return self.is_over and not self._is_held and not 0 <= number - self._first < len(self._entries)

    def _wake(self) -> None:
        for reader in self.readers:
            reader.wake()


class LogReader:
    """Reads a log from its beginning."""

    def __init__(self, log: AnswerLog) -> None:
        self._log = log
        self._place = 0
        self._waiting: asyncio.Future[None] | None = None
        self._is_silent = False
        self._end_s = 0.0  # Event loop time at which the wait ends.
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._log.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.readers.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def is_at_end(self) -> bool:
        return self._log.is_end(self._place)

    def take(self) -> Entry | None:
        entry = self._log.entry(self._place)
        self._place += entry is not None
        return entry

    async def wait(self, idle_s: float | None = None) -> bool:
        """Waits until there is something to read. Returns False if nothing arrives within `idle_s`."""
        loop = asyncio.get_running_loop()
        self._is_silent = False
        if idle_s is not None:
            self._end_s = loop.time() + idle_s
            if self._timer is None:
                self._timer = loop.call_at(self._end_s, self._look, loop)
        self._waiting = loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None
        return not self._is_silent

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if loop.time() < self._end_s:
            self._timer = loop.call_at(self._end_s, self._look, loop)
        else:
            self._is_silent = True
            self.wake()


def _rows(item: LogItem) -> int:
    return len(item.rows) + len(item.prompt_rows) if isinstance(item, TextChunk) else 0
