"""`api.defaults`, checked before a cluster starts: each value against the fields of all endpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from llamaclust.cluster.config.errors import hint
from llamaclust.cluster.front.dialects.anthropic.schema import MessagesBody
from llamaclust.cluster.front.dialects.embeddings import LlamaCppEmbeddingBody, OpenAiEmbeddingBody, RerankBody
from llamaclust.cluster.front.dialects.llamacpp.completions import (
    DetokenizeBody,
    InfillBody,
    LlamaCppBody,
    TemplateBody,
    TokenizeBody,
)
from llamaclust.cluster.front.dialects.ollama.endpoints import EmbedBody, EmbeddingsBody
from llamaclust.cluster.front.dialects.ollama.schema import GenerateBody, OllamaChatBody
from llamaclust.cluster.front.dialects.openai.responses.schema import ResponsesBody
from llamaclust.cluster.front.dialects.openai.responses.store import CompactionBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.foreign_fields import (
    CHAT,
    COMPLETION,
    EMBEDDING,
    LLAMACPP,
    MESSAGES,
    OLLAMA,
    RERANK,
    RESPONSES,
    TEXT_ONLY,
)
from llamaclust.cluster.front.schema import NOTHING_FOREIGN, Body, ForeignFields, field_error
from llamaclust.core.errors import UsageError

ENDPOINTS: Final[tuple[tuple[type[Body], ForeignFields], ...]] = (
    (ChatBody, CHAT),
    (CompletionBody, COMPLETION),
    (ResponsesBody, RESPONSES),
    (CompactionBody, RESPONSES),
    (MessagesBody, MESSAGES),
    (LlamaCppBody, LLAMACPP),
    (InfillBody, LLAMACPP),
    (GenerateBody, OLLAMA),
    (OllamaChatBody, OLLAMA),
    (OpenAiEmbeddingBody, EMBEDDING),
    (LlamaCppEmbeddingBody, EMBEDDING),
    (EmbedBody, NOTHING_FOREIGN),
    (EmbeddingsBody, NOTHING_FOREIGN),
    (RerankBody, RERANK),
    (TokenizeBody, TEXT_ONLY),
    (DetokenizeBody, TEXT_ONLY),
    (TemplateBody, TEXT_ONLY),
)


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """UsageError for a name that no endpoint has, and for a value that none of those with the name takes."""
    objects = tuple(_objects())
    for given, value in defaults.items():
        having = [(kind, name) for kind, foreign in objects if (name := foreign.name(given)) in kind.model_fields]
        if not having:
            known = sorted({name for kind, foreign in objects for name in (*kind.model_fields, *foreign.other_names)})
            near = hint(given, known).partition("; known")[0]
            raise UsageError(f"api.defaults: {given!r} is a field of no endpoint{near or '; leave it out'}")
        errors = [field_error(kind, name, value) for kind, name in having if value is not None]
        if errors and (error := errors[0]) is not None and None not in errors:
            raise UsageError(f"api.defaults: {error}")


def _objects() -> Iterator[tuple[type[Body], ForeignFields]]:
    """What defaults fill: bodies, and their parts that have fields with defaults."""
    for kind, foreign in ENDPOINTS:
        yield kind, foreign
        for name, part in foreign.parts.items():
            inner = kind.model_fields[name].annotation
            if isinstance(inner, type) and issubclass(inner, Body):
                yield inner, part
