"""llama.cpp's own endpoints: /completion, /infill, /tokenize, /detokenize, /apply-template."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.llamacpp.reply import InfillRequests, LlamaCppRequests
from llamaclust.cluster.front.dialects.llamacpp.schema import (
    DetokenizeBody,
    InfillBody,
    LlamaCppBody,
    TemplateBody,
    TokenizeBody,
)
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.foreign_fields import LLAMACPP, TEXT_ONLY
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.threads import TOKENIZING, run_on, tokenizing
from llamaclust.core.errors import ParameterError
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_MAX_PIECES = 1 << 16
_BLOCKING_CHARACTERS = 2048
"""Longer texts are tokenized on a thread."""


class LlamaCppEndpoints:
    """One served model under llama.cpp's names."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings
        self._models = ModelNames(service.settings.model_name, settings, any_by_default=True)

    async def infill(self, data: bytes, ticket: Ticket) -> Reply:
        tokens = self._service.tokenizer.vocabulary.fill_in
        if tokens is None:
            message = "/infill: the model has no tokens for a prefix, a suffix and a middle"
            raise HttpError(501, "not_supported", message)
        body = await parse_body(data, InfillBody, LLAMACPP, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        return InfillRequests(self._service, body, adapters, tokens=tokens).reply()

    async def complete(self, data: bytes, ticket: Ticket) -> Reply:
        body = await parse_body(data, LlamaCppBody, LLAMACPP, self._settings)
        adapters = self._models.adapters(body.model, body.lora, ticket.scales)
        return LlamaCppRequests(self._service, body, adapters).reply()

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeBody, TEXT_ONLY, self._settings)
        if len(body.content) <= _BLOCKING_CHARACTERS:
            return self._tokenized(body)
        return await unless_disconnected(request, run_on(tokenizing(len(body.content)), self._tokenized, body))

    def _tokenized(self, body: TokenizeBody) -> Response:
        """The whole reply: its ids take ten times as much memory as their JSON, and waiting replies keep the latter."""
        ids = self._service.tokenizer.encode(body.content, body.add_special, body.parse_special)
        if not body.with_pieces:
            return JsonResponse({"tokens": ids})
        if len(ids) > _MAX_PIECES:
            reason = f"the text has {len(ids)} tokens, at most {_MAX_PIECES} are shown as pieces; send less at once"
            raise ParameterError("with_pieces", reason)
        return JsonResponse({"tokens": [_piece_entry(self._service.tokenizer, token) for token in ids]})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, TEXT_ONLY, self._settings)
        detokenizing = run_on(TOKENIZING, self._service.tokenizer.decode, body.tokens)
        return JsonResponse({"content": await unless_disconnected(request, detokenizing)})

    async def apply_template(self, request: Request) -> Response:
        body = await read_body(request, TemplateBody, TEXT_ONLY, self._settings)
        rendering = self._service.chat_text(await converted(body, body.request))
        return JsonResponse({"prompt": await unless_disconnected(request, rendering)})


def _piece_entry(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token with its text, or its bytes where they are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}
