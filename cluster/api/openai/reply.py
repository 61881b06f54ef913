"""The reply to one request of OpenAI's endpoints: all its prompts, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from llamaclust.cluster.api.fields.timings import shown_progress, shown_timings
from llamaclust.cluster.api.json_parts import is_large, off_loop_if_large
from llamaclust.cluster.api.json_values import to_json
from llamaclust.cluster.api.openai.schema import StreamOptions
from llamaclust.cluster.api.openai.shapes import FINGERPRINT
from llamaclust.cluster.api.replies.json_body import JsonBody, json_body
from llamaclust.cluster.api.replies.prompt_streams import PromptStreams
from llamaclust.cluster.api.replies.reply import Event
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import DONE, event
from llamaclust.cluster.scheduler.requests import PromptProgress, Timings
from llamaclust.cluster.text.answer import Answer, TextChunk, collect_all
from llamaclust.cluster.text.budget import RowStorage
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream

Choice = dict[str, Any]

_NO_USAGE: Final = {"usage": None}


class Shape(Protocol):
    """How an endpoint shows choices."""

    id_prefix: str
    model: str
    whole_object: str
    chunk_object: str
    shows_timings: bool
    shows_progress: bool
    shows_prompt: bool

    def opening(self, prompt: int, index: int, stream: CompletionStream) -> Choice | None:
        """What a streamed choice begins with."""
        ...

    def chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        """What a chunk adds; None where there is nothing to see."""
        ...

    def text(self, chunk: TextChunk) -> tuple[str, str] | None:
        """The key and the value of the only member by which what a chunk adds differs from what others add to its
        choice; None for a chunk that adds more than a piece of text."""
        ...

    def whole(self, prompt: int, answer: Answer, stream: CompletionStream) -> Choice: ...


Requests = Callable[[], Awaitable[Sequence[CompletionRequest]]]
"""Prepares the completions of a body, one a prompt; raises what refuses it."""


class OpenAiReply:
    """The streams of one request, one a prompt. See `Reply`."""

    acknowledgement: bytes | None = None

    def __init__(
        self,
        service: TextService,
        settings: ApiSettings,
        ticket: Ticket,
        shape: Shape,
        requests: Requests,
        streaming: StreamOptions | None,
    ) -> None:
        """`streaming`: None for a reply that is whole."""
        self.is_streamed = streaming is not None
        self._service = service
        self._settings = settings
        self._ticket = ticket
        self._shape = shape
        self._requests = requests
        self._options = streaming or StreamOptions()
        self._prompts = PromptStreams(service, ticket, RowStorage.STREAMED if self.is_streamed else RowStorage.PACKED)
        self._opened: set[tuple[int, int]] = set()
        self._frame: tuple[bytes, bytes] | None = None  # of events, before and behind their choice
        self._text_frames: dict[tuple[int, int], _TextFrame] = {}  # by prompt and choice

    @property
    def has_measurements(self) -> bool:
        usage = self._options.include_usage and self._options.continuous_usage_stats
        return self._shape.shows_timings or self._shape.shows_progress or usage

    @property
    def _streams(self) -> list[CompletionStream]:
        return self._prompts.streams

    async def start(self) -> None:
        await self._prompts.submit(await self._requests())

    async def wait_first(self) -> None:
        await self._streams[0].wait_first(self._settings.first_chunk_s)

    async def aclose(self) -> None:
        await self._prompts.aclose()

    async def whole(self) -> JsonBody:
        answers = await collect_all(self._streams)
        entries = sum(answer.entries for prompt_answers in answers for answer in prompt_answers)
        return json_body(partial(self._whole, answers), is_large=is_large(entries + self._echoed))

    @property
    def _echoed(self) -> int:
        return sum(len(stream.generation.prompt) for stream in self._streams)

    def _prompt_entries(self, prompt: int, chunk: TextChunk) -> int:
        """Of prompts, in the events of a chunk."""
        is_shown = (prompt, chunk.index) not in self._opened
        is_shown |= self._shape.shows_prompt and chunk.finish_reason is not None
        return self._echoed if is_shown else 0

    def _whole(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        choices = [
            self._shape.whole(prompt, answer, self._streams[prompt])
            for prompt, prompt_answers in enumerate(answers)
            for answer in prompt_answers
        ]
        tokens = sum(len(answer.rows) for prompt_answers in answers for answer in prompt_answers)
        counts = self._usage(tokens, [prompt_answers[0].timings for prompt_answers in answers])
        more = {"timings": shown_timings(answers[0][0].timings)} if self._shape.shows_timings else {}
        more |= self._verbose(self._streams[0])
        return {**self._reply(self._shape.whole_object, choices), "usage": counts, **more}

    async def events(self) -> AsyncGenerator[Event | None, None]:
        options = self._options
        tokens, timings = 0, []
        more: dict[str, Any] = _NO_USAGE if options.include_usage else {}
        read = self._prompts.chunks_and_progress if self._shape.shows_progress else self._prompts.chunks
        async for prompt, chunk in read(self._settings.keepalive_s):
            if chunk is None:
                yield None
                continue
            if isinstance(chunk, PromptProgress):
                yield self._progress(chunk)
                continue
            tokens += len(chunk.rows)
            if (text := self._text_event(prompt, chunk)) is not None:
                yield text
                continue
            if chunk.timings is not None and chunk.index == 0:
                timings.append(chunk.timings)
            if options.include_usage and options.continuous_usage_stats:
                more = {"usage": self._usage(tokens, timings)}
            size = chunk.entries + self._prompt_entries(prompt, chunk)
            rendering = partial(self._events_of, prompt, chunk, more, is_large=is_large(size))
            for shown in await off_loop_if_large(rendering, size):
                yield shown
        if options.include_usage:
            last = {**self._reply(self._shape.chunk_object, []), "usage": self._usage(tokens, timings)}
            last |= {"timings": shown_timings(timings[0])} if self._shape.shows_timings else {}
            yield Event(self._prompts.choices, event(last))
        yield Event(self._prompts.choices, DONE)

    def _progress(self, progress: PromptProgress) -> Event:
        """In a slot of its own: a reply that is computed again has other ones."""
        more = shown_progress(progress, with_timings=self._shape.shows_timings)
        return Event(self._prompts.choices + 1, event({**self._reply(self._shape.chunk_object, []), **more}))

    def _reply(self, kind: str, choices: list[Choice]) -> dict[str, Any]:
        return {
            "id": self._shape.id_prefix + self._ticket.id,
            "object": kind,
            "created": self._ticket.created,
            "model": self._shape.model,
            "system_fingerprint": FINGERPRINT,
            "seed": self._streams[0].generation.seed,
            "choices": choices,
        }

    def _verbose(self, stream: CompletionStream) -> dict[str, Any]:
        """The prompt's text as the model sees it, where it is asked for."""
        if not self._shape.shows_prompt:
            return {}
        return {"__verbose": {"prompt": self._service.tokenizer.decode(stream.generation.prompt)}}

    def _usage(self, tokens: int, timings: Sequence[Timings]) -> dict[str, Any]:
        """Token counts: of the prompts, of all answers, and the cached ones of each prompt's first choice."""
        prompts = sum(len(stream.generation.prompt) for stream in self._streams)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": tokens,
            "total_tokens": prompts + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(timing.cached_tokens for timing in timings)},
        }

    def _events_of(self, prompt: int, chunk: TextChunk, more: dict[str, Any], *, is_large: bool) -> list[Event]:
        shown = self._shown(prompt, chunk)
        if chunk.finish_reason is not None:
            more = {**more, **self._verbose(self._streams[prompt])}
        timed = dict(more)
        if self._shape.shows_timings:
            timed["timings"] = shown_timings(self._streams[prompt].timings(chunk.index))
        events = [
            Event(choice["index"], self._event_of(choice, more if _opens(choice) else timed, is_large=is_large))
            for choice in shown
        ]
        if events and not is_large and _is_same(timed) and (text := self._shape.text(chunk)) is not None:
            self._text_frames[prompt, chunk.index] = _TextFrame.around(text, events[-1])
        return events

    def _text_event(self, prompt: int, chunk: TextChunk) -> Event | None:
        """The event of a chunk that is no more than a piece of text, once another one of its choice was rendered."""
        frame = self._text_frames.get((prompt, chunk.index))
        if frame is None or (text := self._shape.text(chunk)) is None:
            return None
        return Event(frame.slot, frame.begin + to_json(text[1]) + frame.end)

    def _event_of(self, choice: Choice, more: dict[str, Any], *, is_large: bool) -> bytes:
        """Most events of a stream differ in their choice alone: the rest is rendered once."""
        if is_large or not _is_same(more):
            value = {**self._reply(self._shape.chunk_object, [choice]), **more}
            return event(value, is_large=is_large)
        if self._frame is None:
            begin, _, end = event({**self._reply(self._shape.chunk_object, []), **more}).rpartition(b"[]")
            self._frame = begin + b"[", b"]" + end
        begin, end = self._frame
        return begin + to_json(choice) + end

    def _shown(self, prompt: int, chunk: TextChunk) -> list[Choice]:
        opening = None
        if (prompt, chunk.index) not in self._opened:
            self._opened.add((prompt, chunk.index))
            opening = self._shape.opening(prompt, chunk.index, self._streams[prompt])
        return [choice for choice in (opening, self._shape.chunk(prompt, chunk)) if choice is not None]


@dataclass(frozen=True, slots=True)
class _TextFrame:
    """An event of a choice before and behind the text that it adds."""

    slot: int
    begin: bytes
    end: bytes

    @classmethod
    def around(cls, text: tuple[str, str], event: Event) -> _TextFrame:
        """The bytes of the member stand nowhere else in it: quotes in strings are escaped."""
        key, value = to_json(text[0]) + b":", to_json(text[1])
        begin, _, end = event.data.partition(key + value)
        return cls(event.slot, begin + key, end)


def _is_same(more: dict[str, Any]) -> bool:
    """Whether what stands beside the choices is the same in all events."""
    return more in ({}, _NO_USAGE)


def _opens(choice: Choice) -> bool:
    """Whether it begins a message of a chat, before any token."""
    return "role" in choice.get("delta", ())
