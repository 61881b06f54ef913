"""The paths of Ollama's API."""

from __future__ import annotations

from collections.abc import Iterator

from llamaclust.cluster.front.dialects.ollama.bodies import CopyBody, CreateBody, DeleteBody, PullBody
from llamaclust.cluster.front.dialects.ollama.embedding import EmbedBody, EmbeddingsBody, OllamaEmbeddings
from llamaclust.cluster.front.dialects.ollama.generating import OllamaGenerating
from llamaclust.cluster.front.dialects.ollama.managing import OllamaManaging
from llamaclust.cluster.front.dialects.ollama.names import OllamaNames
from llamaclust.cluster.front.dialects.ollama.schema import GenerateBody, OllamaChatBody
from llamaclust.cluster.front.http.error_responses import unsupported
from llamaclust.cluster.front.http.paths import Route
from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.text.service import TextService


def ollama_routes(service: TextService, replies: Replies) -> Iterator[Route]:
    settings = replies.settings
    names = OllamaNames(service.settings.model_name, settings)
    generating = OllamaGenerating(service, settings, names)
    for path, make, body in (
        ("/api/generate", generating.generate, GenerateBody),
        ("/api/chat", generating.chat, OllamaChatBody),
    ):
        yield Route("POST", path, replies.endpoint(path, make, form=StreamFormat.LINES), body, computes=True)
    managing = OllamaManaging(settings, names)
    yield Route("POST", "/api/pull", managing.pull, PullBody)
    yield Route("POST", "/api/create", managing.create, CreateBody)
    yield Route("POST", "/api/copy", managing.copy, CopyBody)
    yield Route("DELETE", "/api/delete", managing.delete, DeleteBody)
    yield Route("GET", "/api/blobs/{digest}", managing.blob)
    yield Route("POST", "/api/blobs/{digest}", unsupported("models are not made from uploaded files", 403))
    yield Route("POST", "/api/push", unsupported("models are not uploaded to registries", 403))
    embeddings = OllamaEmbeddings(service, settings, names)
    yield Route("POST", "/api/embed", embeddings.embed, EmbedBody, computes=True)
    yield Route("POST", "/api/embeddings", embeddings.embeddings, EmbeddingsBody, computes=True)
