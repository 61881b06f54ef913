"""The replies of all endpoints of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from starlette.requests import Request

from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.json_parts import is_large
from llamaclust.cluster.front.replies.json_body import JsonParts, json_body
from llamaclust.cluster.front.text.embedder import Embedding, EmbeddingOptions
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import ParameterError
from llamaclust.model.pooling import Pooling


async def embedded(
    request: Request,
    service: TextService,
    prompts: Sequence[Sequence[str | int]],
    options: EmbeddingOptions,
    shape: Callable[[list[Embedding]], Any],
) -> JsonParts:
    """The embeddings of prompts in the shape of an API. They count for the budget until the client has taken them."""
    async with AsyncExitStack() as held:
        embedding = held.enter_async_context(service.embed(prompts, options))
        embeddings = await unless_disconnected(request, embedding)
        numbers = sum(len(vector) for each in embeddings for vector in each.vectors)
        return JsonParts(json_body(partial(shape, embeddings), is_large=is_large(numbers)), held.pop_all())


def check_single(pooling: Pooling) -> None:
    """ParameterError where a reply of one vector for each prompt cannot have this pooling."""
    if pooling is Pooling.NONE:
        raise ParameterError("pooling", "'none' gives a vector for each token: use POST /embedding, or set another")
