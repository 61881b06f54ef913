"""A reply as its description: what is computed for it, and how its readers see that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogContent, LogItem, Timed
from llamaclust.cluster.front.text.budget import RowStorage
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a stream: the `data:` line of a server-sent event, or a line of JSON. The events of one slot come in
    the same order whenever the reply is read or computed; those of different slots mix as they come."""

    slot: int  # index of a choice; one past the last for what belongs to none
    data: bytes


class View(ABC):
    """Folds the entries of an answer's log to what one client reads. Made anew for each reader; called on a thread
    where what it renders is large."""

    def size(self, prompt: int, item: LogItem) -> int:
        """Tokens, logprobs and texts of about that length in the events of the next entry."""
        return 0

    @abstractmethod
    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> Sequence[Event]:
        """The events that the next entry adds, with those that begin a stream before the first, and those that end an
        answer behind its last. `is_large`: by `size`; other threads go on while such events are rendered."""

    def closing(self) -> Sequence[Event]:
        """The events behind those of all entries."""
        return ()

    @abstractmethod
    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        """The JSON of a reply that is not streamed, of what `AnswerLog.parts` gives."""


MakeView = Callable[[AnswerLog], View]
"""Makes a view of a log that has begun, or is over."""
Requests = Callable[[], Awaitable[Sequence[CompletionRequest]]]
"""Prepares the completions of a body, one a prompt; raises what refuses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a request asks for, independent of the connection that the reply goes to."""

    service: TextService
    requests: Requests
    view: MakeView
    is_streamed: bool
    timed: Timed = Timed.NEVER
    with_progress: bool = False
    keeps_chunks: bool = False  # a reply needs the chunks of its answer until it ends, since it shows logprobs by them
    has_measurements: bool = False
    """Whether its stream shows times, or what the prefix cache had: computed again, it has other bytes. Those of its
    last event do not count."""
    acknowledgement: bytes | None = None
    """The JSON of a client that does not wait for its reply; None: it waits. The reply is kept for it."""
    is_stored: bool = False  # a view has an effect once its answer is complete, so that it is made without a client too

    @property
    def storage(self) -> RowStorage:
        """How rows are held while the reply is computed and read."""
        if self.keeps_chunks:
            return RowStorage.CHUNKS
        return RowStorage.STREAMED if self.is_streamed else RowStorage.PACKED

    def content(self, *, is_kept: bool) -> LogContent:
        """What its log holds."""
        if not self.is_streamed:
            return LogContent(self.storage)
        return LogContent(RowStorage.CHUNKS if is_kept else RowStorage.STREAMED, self.timed, self.with_progress)


MakeReply = Callable[[bytes, Ticket], Awaitable[Reply]]
"""An endpoint: the reply to a body. Raises what refuses the body."""
