"""Converts answers to OpenAI's JSON for text and chat completions: complete replies, or chunks of a stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, TypeVar

from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody, GenerationBody, StreamOptions
from llamaclust.cluster.front.http.sse import DONE
from llamaclust.cluster.front.json_text import shown_progress, shown_timings, to_json
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.schema import Prompt
from llamaclust.cluster.front.text.answer import TextChunk, json_logprob, row_entry
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.front.tools import ClientTool, call_id_of, text_of_call
from llamaclust.cluster.scheduler.requests import FinishReason, PromptProgress, Timings
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.sampler.results import RowResult
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
"""The value of `system_fingerprint`. Builds with the same value compute the same numbers."""

AnyGeneration = TypeVar("AnyGeneration", bound=GenerationBody)
Choice = dict[str, Any]


class OpenAiView(View, Generic[AnyGeneration]):
    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    text_member: ClassVar[str]
    """Name of a choice's field for text. In a streamed chat, the field is in the choice's `delta`."""

    def __init__(
        self, body: AnyGeneration, context: RequestContext, model: str, tokenizer: Tokenizer, log: AnswerLog
    ) -> None:
        self._body = body
        self._context = context
        self._model = model
        self._tokenizer = tokenizer
        self._options = body.stream_options or StreamOptions()
        self._generations = log.generations
        self._choices = body.n * len(log.generations)
        self._prompt_tokens = sum(len(generation.prompt) for generation in log.generations)
        self._opened: set[tuple[int, int]] = set()
        # Choices whose tool calls are complete, as (prompt index, choice index).
        self._calling: set[tuple[int, int]] = set()
        # Keys are (prompt index, choice index). Values are results of `_around`.
        self._texts: dict[tuple[int, int], tuple[int, bytes, bytes]] = {}
        self._tokens = 0  # Number of tokens of all answers so far.
        self._timings: list[Timings] = []  # Timings of each prompt's first choice.

    @abstractmethod
    def _opening(self, prompt: int) -> Choice | None:
        """Returns the JSON of the first event of a streamed choice, or None if the stream begins with the content."""

    @abstractmethod
    def _content(self, prompt: int, part: TextChunk, *, is_whole: bool) -> Choice:
        """Returns the content and logprobs that a chunk adds. If `is_whole`, the chunk is the choice's whole answer."""

    def frames(self, prompt: int, item: LogItem) -> Sequence[Event]:
        # Progress events have their own slot, because their number may change if the reply is computed again.
        if isinstance(item, PromptProgress):
            progress = shown_progress(item, with_timings=self._body.timings_per_token)
            return (Event(self._choices + 1, self._event([], progress)),)
        self._count(item)
        key, text = (prompt, item.index), self._text(item)
        if text is not None and (around := self._texts.get(key)) is not None:
            slot, begin, end = around
            return (Event(slot, begin + to_json(text) + end),)
        choices = [self._choice(prompt, item)]
        if key not in self._opened:
            self._opened.add(key)
            choices.insert(0, self._opening(prompt))
        more: dict[str, Any] = {}
        if self._options.include_usage:
            more["usage"] = self._usage() if self._options.continuous_usage_stats else None
        if item.finish_reason is not None:
            more |= self._verbose(prompt)
        timed, index = more | self._timed(item.timings), prompt * self._body.n + item.index
        events = []
        for choice in filter(None, choices):
            beside = more if _opens(choice) else timed
            events.append(Event(index, self._event([{"index": index, **choice}], beside)))
        if events and text is not None and timed in ({}, {"usage": None}):
            self._texts[key] = _around(self.text_member, text, events[-1])
        return events

    def closing(self) -> Sequence[Event]:
        events = [Event(self._choices, DONE)]
        if self._options.include_usage:
            last = {"usage": self._usage(), **self._timed(self._timings[0])}
            events.insert(0, Event(self._choices, self._event([], last)))
        return events

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        choices: list[Choice] = []
        for prompt, answers in enumerate(parts):
            for answer in answers:
                self._count(answer)
                choices.append({"index": len(choices), **(self._choice(prompt, answer, is_whole=True) or {})})
        more = self._timed(self._timings[0]) | self._verbose(0)
        return {**self._reply(self.whole_object, choices), "usage": self._usage(), **more}

    def _count(self, part: TextChunk) -> None:
        self._tokens += len(part.rows)
        if part.finish_reason is not None and part.index == 0 and part.timings is not None:
            self._timings.append(part.timings)

    def _reply(self, kind: str, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            "id": self.id_prefix + self._context.id,
            "object": kind,
            "created": self._context.created,
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
            "seed": self._generations[0].seed,
            "choices": choices,
        }

    def _event(self, choices: Sequence[Choice], more: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._reply(self.chunk_object, choices), **more}

    def _choice(self, prompt: int, part: TextChunk, *, is_whole: bool = False) -> Choice | None:
        content = self._content(prompt, part, is_whole=is_whole)
        with_ids = self._body.return_token_ids
        is_shown = is_whole or part.finish_reason is not None or (with_ids and bool(part.rows))
        if not (is_shown or any(content.values())):
            return None
        ids = {"token_ids": part.token_ids} if with_ids else {}
        if with_ids and is_whole:
            ids["prompt_token_ids"] = self._generations[prompt].prompt
        return {**content, **ids, **self._ending(prompt, part)}

    def _ending(self, prompt: int, part: TextChunk) -> dict[str, Any]:
        """Returns the fields that end a choice, or a null `finish_reason` if the choice has not ended."""
        if part.finish_reason is None or part.timings is None:
            return {"finish_reason": None}
        waits = part.finish_reason is FinishReason.STOP and (prompt, part.index) in self._calling
        return {
            "finish_reason": "tool_calls" if waits else str(part.finish_reason),
            "stop_reason": part.stopped_by,
            "timings": asdict(part.timings),
        }

    def _text(self, chunk: TextChunk) -> str | None:
        has_more = self._body.with_logprobs or self._body.return_token_ids or chunk.finish_reason is not None
        if has_more or not all(isinstance(event, ContentText) for event in chunk.events):
            return None
        return chunk.text or None

    def _timed(self, timings: Timings | None) -> dict[str, Any]:
        return {} if timings is None or not self._body.timings_per_token else {"timings": shown_timings(timings)}

    def _verbose(self, prompt: int) -> dict[str, Any]:
        if not self._body.verbose:
            return {}
        return {"__verbose": {"prompt": self._tokenizer.decode(self._generations[prompt].prompt)}}

    def _usage(self) -> dict[str, Any]:
        """Returns the token counts so far. Cached tokens count once for each prompt, even with several choices."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "prompt_tokens_details": {"cached_tokens": sum(timing.cached_tokens for timing in self._timings)},
        }


def _around(name: str, text: str, event: Event) -> tuple[int, bytes, bytes]:
    """Returns `event.slot`, and the event's JSON before and after `text`. The JSON has `text` in a field `name`."""
    key = to_json(name) + b":"
    # No string contains this text by accident, because JSON escapes quotes in strings.
    begin, _, end = to_json(event.value).partition(key + to_json(text))
    return event.slot, begin + key, end


def _opens(choice: Choice) -> bool:
    return "role" in choice.get("delta", ())


ShownToken = tuple[int, int, RowResult | None]
"""A token id, the position at which the token's text begins in the choice's text, and the token's logprobs or None."""


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt that a reply repeats (`echo`). `offsets` are the positions in `text` at which tokens begin."""

    text: str = ""
    offsets: Sequence[int] = ()
    unscored: Sequence[ShownToken] = ()  # Tokens without logprobs.

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], score_from: int) -> Echo:
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special=True)
        detokenizer = Detokenizer(tokenizer, text_start=True)
        offsets, length = [], 0
        for token in ids:
            offsets.append(min(length, len(text)))
            length += len(detokenizer.push(token))
        unscored = zip(ids, offsets[: max(1, score_from)], strict=False)
        return cls(text, offsets, [(token, offset, None) for token, offset in unscored])


class CompletionView(OpenAiView[CompletionBody]):
    id_prefix, whole_object, chunk_object, text_member = "cmpl-", "text_completion", "text_completion", "text"

    def __init__(
        self, body: CompletionBody, context: RequestContext, model: str, tokenizer: Tokenizer, log: AnswerLog
    ) -> None:
        super().__init__(body, context, model, tokenizer, log)
        self._echoes: dict[int, Echo] = {}  # Keys are prompt indices.

    def _opening(self, prompt: int) -> Choice | None:
        if not (self._body.echo or self._body.return_token_ids):
            return None
        echo, ids = self._echo(prompt), {"token_ids": (), "prompt_token_ids": self._generations[prompt].prompt}
        begun = {"text": echo.text, "logprobs": self._logprobs(echo.unscored), "finish_reason": None}
        return begun | (ids if self._body.return_token_ids else {})

    def _content(self, prompt: int, part: TextChunk, *, is_whole: bool) -> Choice:
        echo, first = self._echo(prompt), part.prompt_start
        text = echo.text + part.text if is_whole else part.text
        if not self._body.with_logprobs:
            return {"text": text, "logprobs": None}
        scored = zip(part.prompt_rows, echo.offsets[first : first + len(part.prompt_rows)], strict=True)
        chosen = zip(part.rows, part.offsets, strict=True)
        tokens = [
            *(echo.unscored if is_whole else ()),
            *((row.token, offset, row) for row, offset in scored),
            *((row.token, len(echo.text) + offset, row) for row, offset in chosen),
        ]
        return {"text": text, "logprobs": self._logprobs(tokens)}

    def _echo(self, prompt: int) -> Echo:
        if (echo := self._echoes.get(prompt)) is None:
            given, ids = self._body.prompt[prompt], self._generations[prompt].prompt
            made = Echo.of(self._tokenizer, given, ids, self._body.score_from or 0) if self._body.echo else Echo()
            echo = self._echoes[prompt] = made
        return echo

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        return completion_logprobs(self._tokenizer, tokens) if tokens and self._body.with_logprobs else None


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """Returns logprobs in the form of `/v1/completions`."""
    return {
        "tokens": (_label(tokenizer, token) for token, _, _ in tokens),
        "token_logprobs": (None if row is None else json_logprob(row.logprob) for _, _, row in tokens),
        "top_logprobs": (None if row is None else _top(tokenizer, row) for _, _, row in tokens),
        "text_offset": (offset for _, offset, _ in tokens),
    }


def _label(tokenizer: Tokenizer, token: int) -> str:
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(tokenizer: Tokenizer, row: RowResult) -> dict[str, float]:
    labels: dict[str, float] = {}
    for token, logprob in (*row.top_logprobs, (row.token, row.logprob)):
        labels.setdefault(_label(tokenizer, token), json_logprob(logprob))
    return labels


class ChatView(OpenAiView[ChatBody]):
    id_prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    text_member = "content"

    def __init__(
        self, body: ChatBody, context: RequestContext, model: str, tokenizer: Tokenizer, log: AnswerLog
    ) -> None:
        super().__init__(body, context, model, tokenizer, log)
        self._messages: dict[tuple[int, int], Message] = {}  # Keys are (prompt index, choice index).

    def _opening(self, prompt: int) -> Choice:
        ids = {"prompt_token_ids": self._generations[prompt].prompt} if self._body.return_token_ids else {}
        delta = {"role": "assistant", "content": None}  # llama.cpp's clients expect `content` in the first chunk.
        return {"delta": delta, "logprobs": None, "finish_reason": None, **ids}

    def _content(self, prompt: int, part: TextChunk, *, is_whole: bool) -> Choice:
        key, events = (prompt, part.index), part.events or (ContentText(part.text),)
        message = self._messages.setdefault(key, Message(f"{self._context.id} {prompt} {part.index}", self._body.tools))
        added = message.whole(events) if is_whole else message.delta(events)
        if "tool_calls" in added:
            self._calling.add(key)
        if any(isinstance(event, CallEnded) and event.is_cut for event in events):
            self._calling.discard(key)
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs and (part.rows or is_whole):
            logprobs = {"content": (row_entry(self._tokenizer, row) for row in part.rows), "refusal": None}
        content = {"message": {"role": "assistant", **added, "refusal": None}} if is_whole else {"delta": added}
        return {**content, "logprobs": logprobs}


class Message:
    """Builds the chat message of one choice."""

    def __init__(self, choice_id: str, tools: Iterable[ClientTool]) -> None:
        self._choice_id = choice_id
        self._custom = {tool.function_name for tool in tools if tool.kind == "custom"}
        self._texts: dict[int, list[str]] = {}  # Arguments of custom tool calls that have not ended, by call index.

    def whole(self, events: Iterable[AnswerEvent]) -> dict[str, Any]:
        answer = ParsedAnswer()
        answer.add(events)
        message: dict[str, Any] = {"content": answer.content or (None if answer.calls else "")}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            calls = enumerate(answer.calls)
            message["tool_calls"] = [self._call(i, call.name, call.call_id, call.arguments) for i, call in calls]
        return message

    def delta(self, events: Iterable[AnswerEvent]) -> dict[str, Any]:
        answer = ParsedAnswer()
        calls: dict[int, dict[str, Any]] = {}
        for part in events:
            match part:
                case ReasoningText() | ContentText():
                    answer.add((part,))
                case CallBegun(index, name, call_id):
                    calls[index] = {"index": index, **self._call(index, name, call_id, "")}
                    if name in self._custom:
                        self._texts[index] = []
                case ArgumentText(index, text) if index in self._texts:
                    self._texts[index].append(text)
                case ArgumentText(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
                case CallEnded(index) if index in self._texts:
                    call = calls.setdefault(index, {"index": index, "custom": {}})
                    call["custom"]["input"] = text_of_call("".join(self._texts.pop(index)))
        delta: dict[str, Any] = {"reasoning_content": answer.reasoning, "content": answer.content}
        return {key: text for key, text in delta.items() if text} | ({"tool_calls": [*calls.values()]} if calls else {})

    def _call(self, index: int, name: str, call_id: str, arguments: str) -> dict[str, Any]:
        call_id = call_id or call_id_of(self._choice_id, index)
        if name in self._custom:
            return {"id": call_id, "type": "custom", "custom": {"name": name, "input": text_of_call(arguments)}}
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
