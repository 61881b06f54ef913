"""Answers as OpenAI's endpoints show them: choices of all prompts, streamed or whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody, StreamOptions
from llamaclust.cluster.front.dialects.openai.shapes import FINGERPRINT
from llamaclust.cluster.front.fields.timings import shown_progress, shown_timings
from llamaclust.cluster.front.http.sse import DONE, event
from llamaclust.cluster.front.json_values import to_json
from llamaclust.cluster.front.replies.reply import Event, MakeView, Reply, Requests, View
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem, Timed
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptProgress, Timings
from llamaclust.model.tokenizers.tokenizer import Tokenizer

Choice = dict[str, Any]

_NO_USAGE: Final = {"usage": None}


@dataclass(frozen=True, slots=True)
class ReplyKind:
    """Names in the replies of an endpoint."""

    id_prefix: str
    whole_object: str
    chunk_object: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiHead:
    """The fields of a reply beside its choices."""

    kind: ReplyKind
    reply_id: str
    created: int
    model: str
    choices: int  # of a prompt
    streaming: StreamOptions | None  # None: the reply is whole
    shows_timings: bool
    shows_progress: bool
    shows_prompt: bool

    @classmethod
    def of(cls, kind: ReplyKind, body: ChatBody | CompletionBody, ticket: Ticket, model: str) -> OpenAiHead:
        """`model`: the name that is shown."""
        return cls(
            kind=kind,
            reply_id=ticket.id,
            created=ticket.created,
            model=model,
            choices=body.n,
            streaming=body.streaming,
            shows_timings=body.timings_per_token,
            shows_progress=body.return_progress,
            shows_prompt=body.verbose,
        )

    @property
    def options(self) -> StreamOptions:
        """Those of a stream."""
        return self.streaming or StreamOptions()

    def reply(self, service: TextService, requests: Requests, view: MakeView) -> Reply:
        """The description of the reply."""
        usage = self.options.include_usage and self.options.continuous_usage_stats
        return Reply(
            service=service,
            requests=requests,
            view=view,
            is_streamed=self.streaming is not None,
            timed=Timed.ALWAYS if self.shows_timings else Timed.NEVER,
            with_progress=self.shows_progress,
            has_measurements=self.shows_timings or self.shows_progress or usage,
        )


class OpenAiView(View):
    """One reader's view; its endpoint says how a choice looks."""

    def __init__(self, head: OpenAiHead, tokenizer: Tokenizer, log: AnswerLog) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._generations = log.generations
        self._choices = head.choices * len(log.generations)
        self._echoed = sum(len(generation.prompt) for generation in log.generations)
        self._opened: set[tuple[int, int]] = set()
        self._frame: tuple[bytes, bytes] | None = None  # of events, before and behind their choice
        self._texts: dict[tuple[int, int], tuple[int, bytes, bytes]] = {}  # slot, and events around a piece of text
        self._tokens = 0  # of all answers so far
        self._timings: list[Timings] = []  # of each prompt's first choice

    @abstractmethod
    def _opening(self, prompt: int, index: int) -> Choice | None:
        """Returns the beginning of a streamed choice; None for a choice without one."""

    @abstractmethod
    def _chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        """Returns the part of a choice that a chunk adds; None where a client would see nothing."""

    @abstractmethod
    def _text(self, chunk: TextChunk) -> tuple[str, str] | None:
        """The key and the value of the only member by which what a chunk adds differs from what others add to its
        choice; None for a chunk that adds more than a piece of text."""

    @abstractmethod
    def _answer(self, prompt: int, answer: TextChunk) -> Choice:
        """A whole choice."""

    def size(self, prompt: int, item: LogItem) -> int:
        """See `View`. Prompts count where they may be shown."""
        if isinstance(item, PromptProgress):
            return 0
        is_shown = (prompt, item.index) not in self._opened
        is_shown |= self._head.shows_prompt and item.finish_reason is not None
        return item.entries + (self._echoed if is_shown else 0)

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> Sequence[Event]:
        """See `View`."""
        if isinstance(item, PromptProgress):
            return (self._progress(item),)
        self._tokens += len(item.rows)
        choice_key, text = (prompt, item.index), self._text(item)
        if text is not None and (around := self._texts.get(choice_key)) is not None:
            slot, begin, end = around
            return (Event(slot, begin + to_json(text[1]) + end),)
        if item.finish_reason is not None and item.index == 0 and item.timings is not None:
            self._timings.append(item.timings)
        more, timed = self._more(prompt, item)
        events = [
            Event(choice["index"], self._event_of(choice, more if _opens(choice) else timed, is_large=is_large))
            for choice in self._shown(prompt, item)
        ]
        if events and not is_large and text is not None and timed in ({}, _NO_USAGE):
            self._texts[choice_key] = _around(text, events[-1])
        return events

    def closing(self) -> Sequence[Event]:
        """See `View`."""
        events = [Event(self._choices, DONE)]
        if self._head.options.include_usage:
            last = {**self._reply(self._head.kind.chunk_object, []), "usage": self._usage(self._tokens, self._timings)}
            last |= {"timings": shown_timings(self._timings[0])} if self._head.shows_timings else {}
            events.insert(0, Event(self._choices, event(last)))
        return events

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`."""
        choices = [self._answer(prompt, answer) for prompt, answers in enumerate(parts) for answer in answers]
        tokens = sum(len(answer.rows) for answers in parts for answer in answers)
        timings = [answers[0].timings for answers in parts if answers[0].timings is not None]
        more = {"timings": shown_timings(timings[0])} if self._head.shows_timings else {}
        more |= self._verbose(self._generations[0])
        return {**self._reply(self._head.kind.whole_object, choices), "usage": self._usage(tokens, timings), **more}

    def _progress(self, progress: PromptProgress) -> Event:
        """Makes an event in a slot of its own: a reply that is computed again has other progress."""
        more = shown_progress(progress, with_timings=self._head.shows_timings)
        return Event(self._choices + 1, event({**self._reply(self._head.kind.chunk_object, []), **more}))

    def _reply(self, kind: str, choices: list[Choice]) -> dict[str, Any]:
        return {
            "id": self._head.kind.id_prefix + self._head.reply_id,
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": FINGERPRINT,
            "seed": self._generations[0].seed,
            "choices": choices,
        }

    def _verbose(self, generation: GenerationRequest) -> dict[str, Any]:
        """The prompt's text as the model sees it, where it is asked for."""
        if not self._head.shows_prompt:
            return {}
        return {"__verbose": {"prompt": self._tokenizer.decode(generation.prompt)}}

    def _usage(self, tokens: int, timings: Sequence[Timings]) -> dict[str, Any]:
        """Token counts: of the prompts, of all answers, and the cached ones of each prompt's first choice."""
        return {
            "prompt_tokens": self._echoed,
            "completion_tokens": tokens,
            "total_tokens": self._echoed + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(timing.cached_tokens for timing in timings)},
        }

    def _more(self, prompt: int, chunk: TextChunk) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the fields beside the choice of an event that begins a message, and those beside other choices."""
        options = self._head.options
        more: dict[str, Any] = _NO_USAGE if options.include_usage else {}
        if options.include_usage and options.continuous_usage_stats:
            more = {"usage": self._usage(self._tokens, self._timings)}
        if chunk.finish_reason is not None:
            more = {**more, **self._verbose(self._generations[prompt])}
        if self._head.shows_timings and chunk.timings is not None:
            return more, {**more, "timings": shown_timings(chunk.timings)}
        return more, more

    def _event_of(self, choice: Choice, more: dict[str, Any], *, is_large: bool) -> bytes:
        """Most events of a stream differ in their choice alone: the rest is rendered once."""
        if is_large or more not in ({}, _NO_USAGE):
            value = {**self._reply(self._head.kind.chunk_object, [choice]), **more}
            return event(value, is_large=is_large)
        if self._frame is None:
            begin, _, end = event({**self._reply(self._head.kind.chunk_object, []), **more}).rpartition(b"[]")
            self._frame = begin + b"[", b"]" + end
        begin, end = self._frame
        return begin + to_json(choice) + end

    def _shown(self, prompt: int, chunk: TextChunk) -> list[Choice]:
        opening = None
        if (prompt, chunk.index) not in self._opened:
            self._opened.add((prompt, chunk.index))
            opening = self._opening(prompt, chunk.index)
        return [choice for choice in (opening, self._chunk(prompt, chunk)) if choice is not None]


def _around(text: tuple[str, str], event: Event) -> tuple[int, bytes, bytes]:
    """An event before and behind the text that it adds. The bytes of the member stand nowhere else in it: quotes in
    strings are escaped."""
    key, value = to_json(text[0]) + b":", to_json(text[1])
    begin, _, end = event.data.partition(key + value)
    return event.slot, begin + key, end


def _opens(choice: Choice) -> bool:
    """Returns true if the choice begins a message of a chat, before any token."""
    return "role" in choice.get("delta", ())
