"""OpenAI's replies: an answer's log as chunks of a stream, or whole. An endpoint's view says how a choice looks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from llamaclust.cluster.front.dialects.openai.schema import GenerationBody, StreamOptions
from llamaclust.cluster.front.http.sse import DONE, event
from llamaclust.cluster.front.json_text import shown_progress, shown_timings, to_json
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest, PromptProgress, Timings
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.version import VERSION
from llamaclust.model.chat.tools.events import ContentText
from llamaclust.model.tokenizers.tokenizer import Tokenizer

FINGERPRINT = f"build-llamaclust-{VERSION}-numerics-{NUMERICS_VERSION}"
"""`system_fingerprint`: equal ones compute alike."""

AnyGeneration = TypeVar("AnyGeneration", bound=GenerationBody)
Choice = dict[str, Any]

_NO_USAGE: Final = {"usage": None}


@dataclass(frozen=True, slots=True)
class ReplyKind:
    """Names in the replies of an endpoint."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    text: str  # the member of a choice, or of its delta, that a piece of text adds


class OpenAiView(View, Generic[AnyGeneration]):
    """One reader's view."""

    kind: ClassVar[ReplyKind]

    def __init__(
        self, body: AnyGeneration, context: RequestContext, model: str, tokenizer: Tokenizer, log: AnswerLog
    ) -> None:
        """`model`: the name that is shown."""
        self._body = body
        self._context = context
        self._model = model
        self._tokenizer = tokenizer
        self._options = body.stream_options or StreamOptions()
        self._generations = log.generations
        self._choices = body.n * len(log.generations)
        self._echoed = sum(len(generation.prompt) for generation in log.generations)
        self._opened: set[tuple[int, int]] = set()
        self._calling: set[tuple[int, int]] = set()  # choices with calls so far
        self._texts: dict[tuple[int, int], tuple[int, bytes, bytes]] = {}  # slot, and events around a piece of text
        self._tokens = 0  # of all answers so far
        self._timings: list[Timings] = []  # of each prompt's first choice

    @abstractmethod
    def _opening(self, prompt: int, index: int) -> Choice | None:
        """Returns the beginning of a streamed choice, without its index; None for a choice without one."""

    @abstractmethod
    def _content(self, prompt: int, part: TextChunk, *, is_whole: bool) -> Choice:
        """Returns the member of a choice with what a chunk adds, or with a whole answer."""

    @abstractmethod
    def _logprobs(self, prompt: int, part: TextChunk, *, is_whole: bool) -> dict[str, Any] | None:
        """Returns the logprobs of a chunk or a whole answer, where they are asked for."""

    def size(self, prompt: int, item: LogItem) -> int:
        """See `View`. Prompts count where they may be shown."""
        if isinstance(item, PromptProgress):
            return 0
        is_shown = (prompt, item.index) not in self._opened
        is_shown |= self._body.verbose and item.finish_reason is not None
        return item.entries + (self._echoed if is_shown else 0)

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> Sequence[Event]:
        """See `View`. Progress is in a slot of its own: a reply that is computed again has other progress."""
        if isinstance(item, PromptProgress):
            more = shown_progress(item, with_timings=self._body.timings_per_token)
            return (Event(self._choices + 1, self._event([], more)),)
        self._tokens += len(item.rows)
        key, text = (prompt, item.index), self._text(item)
        if text is not None and (around := self._texts.get(key)) is not None:
            slot, begin, end = around
            return (Event(slot, begin + to_json(text) + end),)
        if item.finish_reason is not None and item.index == 0 and item.timings is not None:
            self._timings.append(item.timings)
        more = self._more(prompt, item)
        timed = more | self._timed(item.timings)
        events = [
            Event(choice["index"], self._event([choice], more if _opens(choice) else timed, is_large=is_large))
            for choice in self._shown(prompt, item)
        ]
        if events and not is_large and text is not None and timed in ({}, _NO_USAGE):
            self._texts[key] = _around(self.kind.text, text, events[-1])
        return events

    def closing(self) -> Sequence[Event]:
        """See `View`."""
        events = [Event(self._choices, DONE)]
        if self._options.include_usage:
            last = {"usage": self._usage(self._tokens, self._timings), **self._timed(self._timings[0])}
            events.insert(0, Event(self._choices, self._event([], last)))
        return events

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`."""
        choices = [
            self._choice(prompt, answer, is_whole=True) for prompt, answers in enumerate(parts) for answer in answers
        ]
        tokens = sum(len(answer.rows) for answers in parts for answer in answers)
        timings = [answers[0].timings for answers in parts if answers[0].timings is not None]
        more = self._timed(timings[0]) | self._verbose(self._generations[0])
        return {**self._reply(self.kind.whole_object, choices), "usage": self._usage(tokens, timings), **more}

    def _reply(self, kind: str, choices: Sequence[Choice | None]) -> dict[str, Any]:
        return {
            "id": self.kind.id_prefix + self._context.id,
            "object": kind,
            "created": self._context.created,
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
            "seed": self._generations[0].seed,
            "choices": choices,
        }

    def _event(self, choices: Sequence[Choice], more: Mapping[str, Any], *, is_large: bool = False) -> bytes:
        return event({**self._reply(self.kind.chunk_object, choices), **more}, is_large=is_large)

    def _shown(self, prompt: int, chunk: TextChunk) -> list[Choice]:
        """What a chunk adds to its choice, behind its beginning."""
        choices = [self._choice(prompt, chunk)]
        if (prompt, chunk.index) not in self._opened:
            self._opened.add((prompt, chunk.index))
            choices.insert(0, self._opening(prompt, chunk.index))
        return [choice for choice in choices if choice is not None]

    def _choice(self, prompt: int, part: TextChunk, *, is_whole: bool = False) -> Choice | None:
        """What a chunk adds to a choice, or a whole one; None where a client would see nothing."""
        content = self._content(prompt, part, is_whole=is_whole)
        logprobs = self._logprobs(prompt, part, is_whole=is_whole)
        with_ids = self._body.return_token_ids
        is_shown = is_whole or part.finish_reason is not None or (with_ids and bool(part.rows))
        if not (is_shown or logprobs or any(content.values())):
            return None
        ids = {"token_ids": part.token_ids} if with_ids else {}
        if with_ids and is_whole:
            ids["prompt_token_ids"] = self._generations[prompt].prompt
        index = self._index(prompt, part.index)
        return {"index": index, **content, "logprobs": logprobs, **ids, **self._ending(prompt, part)}

    def _index(self, prompt: int, index: int) -> int:
        return prompt * self._body.n + index

    def _ending(self, prompt: int, part: TextChunk) -> dict[str, Any]:
        """How a choice ended, null while it goes on. `stop_reason` (vLLM's) is the stop string or the end token's id.
        A complete answer with calls waits for their results."""
        if part.finish_reason is None or part.timings is None:
            return {"finish_reason": None}
        waits = part.finish_reason is FinishReason.STOP and (prompt, part.index) in self._calling
        return {
            "finish_reason": "tool_calls" if waits else str(part.finish_reason),
            "stop_reason": part.stopped_by,
            "timings": asdict(part.timings),
        }

    def _text(self, chunk: TextChunk) -> str | None:
        """The text of a chunk that adds nothing else to its choice."""
        has_more = self._body.with_logprobs or self._body.return_token_ids or chunk.finish_reason is not None
        if has_more or not all(isinstance(event, ContentText) for event in chunk.events):
            return None
        return chunk.text or None

    def _more(self, prompt: int, chunk: TextChunk) -> dict[str, Any]:
        """The fields beside a choice."""
        more: dict[str, Any] = _NO_USAGE if self._options.include_usage else {}
        if self._options.include_usage and self._options.continuous_usage_stats:
            more = {"usage": self._usage(self._tokens, self._timings)}
        return more | (self._verbose(self._generations[prompt]) if chunk.finish_reason is not None else {})

    def _timed(self, timings: Timings | None) -> dict[str, Any]:
        return {} if timings is None or not self._body.timings_per_token else {"timings": shown_timings(timings)}

    def _verbose(self, generation: GenerationRequest) -> dict[str, Any]:
        """The prompt's text as the model sees it, where it is asked for."""
        return {"__verbose": {"prompt": self._tokenizer.decode(generation.prompt)}} if self._body.verbose else {}

    def _usage(self, tokens: int, timings: Sequence[Timings]) -> dict[str, Any]:
        """Token counts: of the prompts, of all answers, and the cached ones of each prompt's first choice."""
        return {
            "prompt_tokens": self._echoed,
            "completion_tokens": tokens,
            "total_tokens": self._echoed + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(timing.cached_tokens for timing in timings)},
        }


def _around(name: str, text: str, event: Event) -> tuple[int, bytes, bytes]:
    """An event before and behind the text that it adds. The bytes of the member stand nowhere else in it: quotes in
    strings are escaped."""
    key = to_json(name) + b":"
    begin, _, end = event.data.partition(key + to_json(text))
    return event.slot, begin + key, end


def _opens(choice: Choice) -> bool:
    """Returns true if the choice begins a message of a chat, before any token."""
    return "role" in choice.get("delta", ())
