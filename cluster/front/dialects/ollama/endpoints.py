"""The paths of Ollama's API, with `/api/generate`, `/api/chat` and embeddings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import converted, parse_body, read_body
from llamaclust.cluster.front.dialects.embeddings import MAX_INPUTS, check_single, embedded
from llamaclust.cluster.front.dialects.ollama.managing import OllamaManaging
from llamaclust.cluster.front.dialects.ollama.models import OllamaNames
from llamaclust.cluster.front.dialects.ollama.reply import Lines, LoadView, OllamaView, Show, as_message, as_text
from llamaclust.cluster.front.dialects.ollama.schema import (
    AnswerFields,
    CopyBody,
    CreateBody,
    DeleteBody,
    GenerateBody,
    ModelBody,
    OllamaChatBody,
    PullBody,
)
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.foreign_fields import anything
from llamaclust.cluster.front.http.responses import JsonResponse, Route, unsupported
from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.reply import MakeView, Reply, Requests
from llamaclust.cluster.front.schema import ForeignFields, strings
from llamaclust.cluster.front.settings import ApiSettings, read_keep_alive
from llamaclust.cluster.front.text.embedder import EUCLIDEAN, Embedding, EmbeddingOptions
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.errors import ParameterError
from llamaclust.model.pooling import Pooling
from llamaclust.model.tokenizers.gaps import Gap

_FOREIGN: Final = ForeignFields(hints=dict.fromkeys(("keep_alive", "truncate", "options"), anything))
"""Prompts are never truncated, and no option changes an embedding."""
_UNCHANGED: Final = -1


def _texts(value: Any) -> tuple[str, ...]:
    texts = strings(value)
    if len(texts) > MAX_INPUTS:
        raise ValueError(f"{len(texts)} texts in one request, at most {MAX_INPUTS} are taken")
    return texts


_TEXTS: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class _Fields(ModelBody, foreign=_FOREIGN):
    pooling: Literal["none", "mean", "cls", "last"] | None = None
    """Which tokens' hidden states make the embedding; by default as the model file says, else the last one's. `none`,
    which defaults for all endpoints may name, is refused: the replies have one vector for each text."""


class EmbedBody(_Fields):
    """`POST /api/embed`."""

    input: Annotated[tuple[str, ...], BeforeValidator(_texts), WithJsonSchema(_TEXTS)]
    """A text, or a list of texts."""
    dimensions: int | None = Field(default=None, ge=1)
    """Leading numbers to keep; by default all."""


class EmbeddingsBody(_Fields):
    """`POST /api/embeddings`."""

    prompt: str
    """The text."""


class OllamaEmbeddings:
    """One served model's."""

    def __init__(self, service: TextService, settings: ApiSettings, names: OllamaNames) -> None:
        self._service = service
        self._settings = settings
        self._names = names

    async def embed(self, request: Request) -> Response:
        """A vector of length 1 for each text."""
        body = await read_body(request, EmbedBody, self._settings)
        self._names.check(body.model)
        begun_ns = time.perf_counter_ns()

        def shape(embeddings: list[Embedding]) -> dict[str, Any]:
            return {
                "model": self._service.settings.model_name,
                "embeddings": (embedding.vectors[0].tolist() for embedding in embeddings),
                "total_duration": time.perf_counter_ns() - begun_ns,
                "load_duration": 0,
                "prompt_eval_count": sum(embedding.prompt_tokens for embedding in embeddings),
            }

        options = EmbeddingOptions(self._pooling(body), EUCLIDEAN, body.dimensions)
        if not body.input:
            return JsonResponse(shape([]))
        return await embedded(request, self._service, [(text,) for text in body.input], options, shape)

    async def embeddings(self, request: Request) -> Response:
        """A vector of the length that the model gave it; an empty one for an empty text, as the model is loaded."""
        body = await read_body(request, EmbeddingsBody, self._settings)
        self._names.check(body.model)

        def shape(embeddings: list[Embedding]) -> dict[str, Any]:
            return {"embedding": embeddings[0].vectors[0].tolist()}

        options = EmbeddingOptions(self._pooling(body), _UNCHANGED)
        if not body.prompt:
            return JsonResponse({"embedding": []})
        return await embedded(request, self._service, [(body.prompt,)], options, shape)

    def _pooling(self, body: _Fields) -> Pooling:
        pooling = self._service.settings.pooling if body.pooling is None else Pooling(body.pooling)
        check_single(pooling)
        return pooling


class OllamaGenerating:
    """One served model under Ollama's names."""

    def __init__(self, service: TextService, settings: ApiSettings, names: OllamaNames) -> None:
        self._service = service
        self._settings = settings
        self._names = names

    async def generate(self, data: bytes, context: RequestContext) -> Reply:
        body = await parse_body(data, GenerateBody, self._settings)

        adapters = self._names.adapters(body.model, context.scales)

        async def requests() -> list[CompletionRequest]:
            return [replace(await self._generation(body, context), adapters=adapters)]

        return self._reply(body, context, requests, as_text, with_context=not body.raw)

    async def chat(self, data: bytes, context: RequestContext) -> Reply:
        body = await parse_body(data, OllamaChatBody, self._settings)

        adapters = self._names.adapters(body.model, context.scales)

        async def requests() -> list[CompletionRequest]:
            await self._check_reasoning(body)
            chat = (await converted(body, body.chat)).admitted(context.created, adapters)
            return [await self._service.chat(chat)]

        return self._reply(body, context, requests, as_message, with_context=False)

    def _reply(
        self,
        body: GenerateBody | OllamaChatBody,
        context: RequestContext,
        requests: Requests,
        show: Show,
        *,
        with_context: bool,
    ) -> Reply:
        service = self._service
        lines = Lines(self._names.shown(body.model), context.created, show)
        view: MakeView = partial(
            OllamaView, service.tokenizer, lines, with_logprobs=body.logprobs, with_context=with_context
        )
        if body.is_load:
            unloads = self._settings.can_unload and read_keep_alive(body.keep_alive) == 0
            loaded = LoadView(lines, "unload" if unloads else "load")
            return Reply(service=service, requests=_nothing, view=lambda _: loaded, is_streamed=body.stream)

        return Reply(service=service, requests=requests, view=view, is_streamed=body.stream)

    async def _generation(self, body: GenerateBody, context: RequestContext) -> CompletionRequest:
        """The context of an earlier reply stands before the prompt, whose BOS it has."""
        earlier = tuple(body.context)
        await self._check_reasoning(body)
        if body.suffix:
            return await self._fill_in(body)
        if body.raw:
            if not earlier:
                return await converted(body, body.completion, body.prompt)
            (prompt,) = await self._service.tokenize_all([body.prompt], "prompt")
            return await converted(body, body.completion, (*earlier, *prompt))
        request = await self._service.chat((await converted(body, body.chat)).admitted(context.created, ()))
        assert not isinstance(request.prompt, str)
        bos = self._service.tokenizer.bos_id
        own = request.prompt[1:] if earlier and request.prompt[:1] == (bos,) else request.prompt
        return replace(request, prompt=(*earlier, *own))

    async def _fill_in(self, body: GenerateBody) -> CompletionRequest:
        service = self._service
        if service.tokenizer.vocabulary.fill_in is None:
            message = f"{service.settings.model_name!r} does not support insert; leave suffix out"
            raise HttpError(400, "unsupported_parameter", message, param="suffix")
        if body.raw or body.context or body.system:
            raise ParameterError("suffix", "cannot be used together with raw, context or system")
        request, gap = await converted(body, body.completion), Gap(body.prompt, body.suffix)
        return replace(request, prompt=await service.fill_in(gap, request.max_new_tokens))

    async def _check_reasoning(self, body: AnswerFields) -> None:
        """Reasoning of a model that knows none is refused, as Ollama does."""
        if body.wants_reasoning and not (await self._service.chat_format.get()).knows_reasoning:
            message = f"{self._service.settings.model_name!r} does not support thinking; leave think out"
            raise HttpError(400, "unsupported_parameter", message, param="think")


async def _nothing() -> list[CompletionRequest]:
    """A request that only loads a model computes nothing."""
    return []


def ollama_routes(service: TextService, replies: Replies) -> Iterator[Route]:
    settings = replies.settings
    names = OllamaNames(service.settings.model_name, settings)
    generating = OllamaGenerating(service, settings, names)
    for path, make, body in (
        ("/api/generate", generating.generate, GenerateBody),
        ("/api/chat", generating.chat, OllamaChatBody),
    ):
        answer = replies.endpoint(path, make, form=StreamFormat.LINES)
        yield Route("POST", path, answer, body, computes=True, form=StreamFormat.LINES.value)
    managing = OllamaManaging(settings, names)
    yield Route("POST", "/api/pull", managing.pull, PullBody, form=StreamFormat.LINES.value)
    yield Route("POST", "/api/create", managing.create, CreateBody, form=StreamFormat.LINES.value)
    yield Route("POST", "/api/copy", managing.copy, CopyBody, types=())
    yield Route("DELETE", "/api/delete", managing.delete, DeleteBody, types=())
    yield Route("GET", "/api/blobs/{digest}", managing.blob)
    yield Route("POST", "/api/blobs/{digest}", unsupported("models are not made from uploaded files", 403))
    yield Route("POST", "/api/push", unsupported("models are not uploaded to registries", 403))
    embeddings = OllamaEmbeddings(service, settings, names)
    yield Route("POST", "/api/embed", embeddings.embed, EmbedBody, computes=True)
    yield Route("POST", "/api/embeddings", embeddings.embeddings, EmbeddingsBody, computes=True)
