"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from llamaclust.cluster.front.body import converted, parse_body
from llamaclust.cluster.front.dialects.openai.schema import CompletionBody
from llamaclust.cluster.front.dialects.openai.shapes import (
    NO_ECHO,
    Echo,
    ShownToken,
    completion_logprobs,
    ending,
    make_echo,
)
from llamaclust.cluster.front.dialects.openai.view import Choice, OpenAiHead, OpenAiView, ReplyKind
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.foreign_fields import COMPLETION
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_KIND: Final = ReplyKind("cmpl-", "text_completion", "text_completion")


class CompletionEndpoint:
    """Prompts as they are, text or token ids."""

    def __init__(self, service: TextService, settings: ApiSettings, models: ModelNames) -> None:
        self._service = service
        self._settings = settings
        self._models = models

    async def create(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, CompletionBody, COMPLETION, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        body.check()

        async def requests() -> list[CompletionRequest]:
            return [replace(request, adapters=adapters) for request in await converted(body, body.requests)]

        head = OpenAiHead.of(_KIND, body, ticket, self._models.shown(body.model))
        return head.reply(self._service, requests, partial(CompletionView, body, head, self._service.tokenizer))


class CompletionView(OpenAiView):
    """Choices as text."""

    def __init__(self, body: CompletionBody, head: OpenAiHead, tokenizer: Tokenizer, log: AnswerLog) -> None:
        super().__init__(head, tokenizer, log)
        self._body = body
        self._echoes: dict[int, Echo] = {}

    def _opening(self, prompt: int, index: int) -> Choice | None:
        if not (self._body.echo or self._body.return_token_ids):
            return None
        echo = self._echo(prompt)
        logprobs = self._logprobs(echo.unscored)
        choice = {"index": self._index(prompt, index), "text": echo.text, "logprobs": logprobs, "finish_reason": None}
        return choice | self._ids(token_ids=(), prompt_token_ids=self._generations[prompt].prompt)

    def _chunk(self, prompt: int, chunk: TextChunk) -> Choice | None:
        has_tokens = bool(chunk.rows) and self._body.return_token_ids
        logprobs = None if self._body.logprobs is None else self._logprobs(self._shown_tokens(prompt, chunk))
        if not (chunk.text or has_tokens or logprobs or chunk.finish_reason):
            return None
        return {
            "index": self._index(prompt, chunk.index),
            "text": chunk.text,
            "logprobs": logprobs,
            **self._ids(token_ids=chunk.token_ids),
            **ending(chunk),
        }

    def _text(self, chunk: TextChunk) -> tuple[str, str] | None:
        has_more = self._body.logprobs is not None or self._body.return_token_ids or chunk.finish_reason is not None
        return None if has_more or not chunk.text else ("text", chunk.text)

    def _answer(self, prompt: int, answer: TextChunk) -> Choice:
        echo = self._echo(prompt)
        return {
            "index": self._index(prompt, answer.index),
            "text": echo.text + answer.text,
            "logprobs": self._logprobs([*echo.unscored, *self._shown_tokens(prompt, answer)]),
            **self._ids(token_ids=answer.token_ids, prompt_token_ids=self._generations[prompt].prompt),
            **ending(answer),
        }

    def _index(self, prompt: int, index: int) -> int:
        return prompt * self._body.n + index

    def _ids(self, **ids: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return ids if self._body.return_token_ids else {}

    def _echo(self, prompt: int) -> Echo:
        """Made once a prompt."""
        if prompt not in self._echoes:
            given = self._body.prompt[prompt]
            score_from = self._body.score_from or 0
            ids = self._generations[prompt].prompt
            echo = make_echo(self._tokenizer, given, ids, score_from) if self._body.echo else NO_ECHO
            self._echoes[prompt] = echo
        return self._echoes[prompt]

    def _shown_tokens(self, prompt: int, part: TextChunk) -> list[ShownToken]:
        echo = self._echoes.get(prompt, NO_ECHO)
        first = part.prompt_start
        scored = zip(part.prompt_rows, echo.offsets[first : first + len(part.prompt_rows)], strict=True)
        chosen = zip(part.rows, part.offsets, strict=True)
        return [
            *(ShownToken(row.token, offset, row) for row, offset in scored),
            *(ShownToken(row.token, len(echo.text) + offset, row) for row, offset in chosen),
        ]

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if self._body.logprobs is None or not tokens:
            return None
        return completion_logprobs(self._tokenizer, tokens)
