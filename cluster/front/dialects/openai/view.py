"""OpenAI's replies: an answer's log as chunks of a stream, or whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody, StreamOptions
from llamaclust.cluster.front.fields.timings import shown_progress, shown_timings
from llamaclust.cluster.front.fields.tools import ClientTool, call_id_of, text_of_call
from llamaclust.cluster.front.http.sse import DONE, event
from llamaclust.cluster.front.json_text import to_json
from llamaclust.cluster.front.replies.reply import Event, MakeView, Reply, Requests, View
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.schema import Prompt
from llamaclust.cluster.front.text.answer import TextChunk, json_logprob
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem, Timed
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptProgress, Timings
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.sampling import RowResult
from llamaclust.core.version import VERSION
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ParsedAnswer,
    ReasoningText,
)
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer

FINGERPRINT = f"build-llamaclust-{VERSION}-numerics-{NUMERICS_VERSION}"
"""`system_fingerprint`: equal ones compute alike."""


def ending(part: TextChunk) -> dict[str, Any]:
    """How a choice ended, null while it goes on. `stop_reason` (vLLM's) is the stop string or the end token's id."""
    if part.finish_reason is None or part.timings is None:
        return {"finish_reason": None}
    return {
        "finish_reason": str(part.finish_reason),
        "stop_reason": part.stopped_by,
        "timings": asdict(part.timings),
    }


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token at a place in a choice's text; without a row where nothing stands before it."""

    token: int
    offset: int
    row: RowResult | None


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands before its answers: its text, where each of its tokens begins, those without a logprob."""

    text: str
    offsets: tuple[int, ...]
    unscored: tuple[ShownToken, ...]


NO_ECHO = Echo("", (), ())


def make_echo(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], score_from: int) -> Echo:
    """The prompt as it was given, or the text of its token ids. Its first token never has a logprob."""
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special=True)
    detokenizer = Detokenizer(tokenizer, text_start=True)
    offsets, length = [], 0
    for token in ids:
        offsets.append(min(length, len(text)))
        length += len(detokenizer.push(token))
    unscored = zip(ids, offsets[: max(1, score_from)], strict=False)
    return Echo(text, tuple(offsets), tuple(ShownToken(token, offset, None) for token, offset in unscored))


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """Iterators, for many tokens."""
    rows = [token.row for token in tokens]
    return {
        "tokens": (_label(tokenizer, token.token) for token in tokens),
        "token_logprobs": (None if row is None else json_logprob(row.logprob) for row in rows),
        "top_logprobs": (None if row is None else _top(tokenizer, row) for row in rows),
        "text_offset": (token.offset for token in tokens),
    }


def _label(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes where they are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(tokenizer: Tokenizer, row: RowResult) -> dict[str, float]:
    """The likeliest tokens by label, best first, and the chosen one; of tokens that look alike, the best."""
    labels: dict[str, float] = {}
    for token, logprob in (*row.top_logprobs, (row.token, row.logprob)):
        labels.setdefault(_label(tokenizer, token), json_logprob(logprob))
    return labels


class MessageDeltas:
    """A streamed message. The text of a custom tool's call is known, and comes, at its end."""

    def __init__(self, choice_id: str, tools: Mapping[str, ClientTool]) -> None:
        """`tools`: by the names that the model knows."""
        self.has_calls = False
        self._choice_id = choice_id
        self._tools = tools
        self._texts: dict[int, list[str]] = {}  # arguments so far of open calls of custom tools

    def take(self, events: Iterable[AnswerEvent]) -> dict[str, Any]:
        """Returns one delta of all events. Clients put pieces together by kind, and calls by index."""
        answer = ParsedAnswer()
        calls: dict[int, dict[str, Any]] = {}
        for part in events:
            match part:
                case ReasoningText(text):
                    answer.reasoning += text
                case ContentText(text):
                    answer.content += text
                case CallBegun(index, name, call_id):
                    calls[index] = {"index": index, **self._begun(index, name, call_id)}
                case ArgumentText(index, text) if index in self._texts:
                    self._texts[index].append(text)
                case ArgumentText(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
                case CallEnded(index) if index in self._texts:
                    self._end_text(index, calls)
        self.has_calls |= bool(calls)
        delta: dict[str, Any] = {"reasoning_content": answer.reasoning, "content": answer.content}
        return {key: text for key, text in delta.items() if text} | ({"tool_calls": [*calls.values()]} if calls else {})

    def _begun(self, index: int, name: str, call_id: str) -> dict[str, Any]:
        call = _shown_call(call_id or call_id_of(self._choice_id, index), name, "", self._tools)
        if call["type"] == "custom":
            self._texts[index] = []
        return call

    def _end_text(self, index: int, calls: dict[int, dict[str, Any]]) -> None:
        call = calls.setdefault(index, {"index": index, "custom": {}})
        call["custom"]["input"] = text_of_call("".join(self._texts.pop(index)))


def _shown_call(call_id: str, name: str, arguments: str, tools: Mapping[str, ClientTool]) -> dict[str, Any]:
    if name in tools and tools[name].kind == "custom":
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": text_of_call(arguments)}}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def message_of(events: Iterable[AnswerEvent], choice_id: str, tools: Mapping[str, ClientTool]) -> dict[str, Any]:
    """The fields of a whole message: content is null beside calls where there is none."""
    answer = ParsedAnswer()
    answer.add(events)
    message: dict[str, Any] = {"content": answer.content or (None if answer.calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            _shown_call(call.call_id or call_id_of(choice_id, index), call.name, call.arguments, tools)
            for index, call in enumerate(answer.calls)
        ]
    return message


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
