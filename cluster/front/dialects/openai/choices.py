"""Choices in OpenAI's replies: as text of `/v1/completions`, as messages of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.dialects.openai.view import Choice, OpenAiView, ReplyKind
from llamaclust.cluster.front.sampling import row_entry
from llamaclust.cluster.front.schema import Prompt
from llamaclust.cluster.front.text.answer import TextChunk, json_logprob
from llamaclust.cluster.front.text.answer_log import AnswerLog
from llamaclust.cluster.front.tools import ClientTool, call_id_of, text_of_call
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.sampling import RowResult
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

ShownToken = tuple[int, int, RowResult | None]
"""A token, the place of its text in a choice's, and its row; None where nothing stands before it."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands before its answers: its text, where each of its tokens begins, those without a logprob."""

    text: str = ""
    offsets: Sequence[int] = ()
    unscored: Sequence[ShownToken] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], score_from: int) -> Echo:
        """The prompt as it was given, or the text of its token ids. Its first token never has a logprob."""
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special=True)
        detokenizer = Detokenizer(tokenizer, text_start=True)
        offsets, length = [], 0
        for token in ids:
            offsets.append(min(length, len(text)))
            length += len(detokenizer.push(token))
        unscored = zip(ids, offsets[: max(1, score_from)], strict=False)
        return cls(text, offsets, [(token, offset, None) for token, offset in unscored])


class CompletionView(OpenAiView[CompletionBody]):
    """Choices as text."""

    kind = ReplyKind("cmpl-", "text_completion", "text_completion", "text")

    def __init__(
        self, body: CompletionBody, context: RequestContext, model: str, tokenizer: Tokenizer, log: AnswerLog
    ) -> None:
        super().__init__(body, context, model, tokenizer, log)
        self._echoes: dict[int, Echo] = {}  # by prompt

    def _opening(self, prompt: int, index: int) -> Choice | None:
        if not (self._body.echo or self._body.return_token_ids):
            return None
        echo, ids = self._echo(prompt), {"token_ids": (), "prompt_token_ids": self._generations[prompt].prompt}
        return {
            "index": self._index(prompt, index),
            "text": echo.text,
            "logprobs": self._shown_logprobs(echo.unscored),
            "finish_reason": None,
            **(ids if self._body.return_token_ids else {}),
        }

    def _content(self, prompt: int, part: TextChunk, *, is_whole: bool) -> Choice:
        return {"text": self._echo(prompt).text + part.text if is_whole else part.text}

    def _logprobs(self, prompt: int, part: TextChunk, *, is_whole: bool) -> dict[str, Any] | None:
        if not self._body.with_logprobs:
            return None
        echo, first = self._echo(prompt), part.prompt_start
        scored = zip(part.prompt_rows, echo.offsets[first : first + len(part.prompt_rows)], strict=True)
        chosen = zip(part.rows, part.offsets, strict=True)
        return self._shown_logprobs(
            [
                *(echo.unscored if is_whole else ()),
                *((row.token, offset, row) for row, offset in scored),
                *((row.token, len(echo.text) + offset, row) for row, offset in chosen),
            ]
        )

    def _echo(self, prompt: int) -> Echo:
        """Made once a prompt."""
        if prompt not in self._echoes:
            self._echoes[prompt] = Echo()
            if self._body.echo:
                given, ids = self._body.prompt[prompt], self._generations[prompt].prompt
                self._echoes[prompt] = Echo.of(self._tokenizer, given, ids, self._body.score_from or 0)
        return self._echoes[prompt]

    def _shown_logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        return completion_logprobs(self._tokenizer, tokens) if tokens and self._body.with_logprobs else None


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """Iterators, for many tokens."""
    return {
        "tokens": (_label(tokenizer, token) for token, _, _ in tokens),
        "token_logprobs": (None if row is None else json_logprob(row.logprob) for _, _, row in tokens),
        "top_logprobs": (None if row is None else _top(tokenizer, row) for _, _, row in tokens),
        "text_offset": (offset for _, offset, _ in tokens),
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


class ChatView(OpenAiView[ChatBody]):
    """Choices as messages of a chat."""

    kind = ReplyKind("chatcmpl-", "chat.completion", "chat.completion.chunk", "content")

    def __init__(
        self, body: ChatBody, context: RequestContext, model: str, tokenizer: Tokenizer, log: AnswerLog
    ) -> None:
        super().__init__(body, context, model, tokenizer, log)
        self._messages: dict[tuple[int, int], Message] = {}  # by prompt and choice

    def _opening(self, prompt: int, index: int) -> Choice:
        ids = {"prompt_token_ids": self._generations[prompt].prompt} if self._body.return_token_ids else {}
        delta = {"role": "assistant", "content": None}  # clients of llama.cpp read it from the first chunk on
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **ids}

    def _content(self, prompt: int, part: TextChunk, *, is_whole: bool) -> Choice:
        key, events = (prompt, part.index), part.events or (ContentText(part.text),)
        message = self._messages.setdefault(key, Message(f"{self._context.id} {prompt} {part.index}", self._body.tools))
        added = message.whole(events) if is_whole else message.delta(events)
        if "tool_calls" in added:
            self._calling.add(key)
        return {"message": {"role": "assistant", **added, "refusal": None}} if is_whole else {"delta": added}

    def _logprobs(self, prompt: int, part: TextChunk, *, is_whole: bool) -> dict[str, Any] | None:
        if not self._body.logprobs or not (part.rows or is_whole):
            return None
        return {"content": (row_entry(self._tokenizer, row) for row in part.rows), "refusal": None}


class Message:
    """The message of a choice. In a stream, the text of a custom tool's call is known, and comes, at its end."""

    def __init__(self, choice_id: str, tools: Iterable[ClientTool]) -> None:
        self._choice_id = choice_id
        self._custom = {tool.function_name for tool in tools if tool.kind == "custom"}
        self._texts: dict[int, list[str]] = {}  # arguments so far of open calls of custom tools

    def whole(self, events: Iterable[AnswerEvent]) -> dict[str, Any]:
        """Returns the fields that all events make: content is null beside calls where there is none."""
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
        """Returns one delta of the next events. Clients put pieces together by kind, and calls by index."""
        answer = ParsedAnswer()
        calls: dict[int, dict[str, Any]] = {}
        for part in events:
            match part:
                case ReasoningText(text):
                    answer.reasoning += text
                case ContentText(text):
                    answer.content += text
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
