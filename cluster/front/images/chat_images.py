"""Fetches a chat's images. The journal stores them up to a size limit, so that a restart need not fetch them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Final

from llamaclust.cluster.front.images.urls import WEB
from llamaclust.cluster.front.text.images import MAX_IMAGES, MAX_IMAGES_BYTES, Omission, image_urls
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.errors import ParameterError, RequestFailedError

MAX_JOURNALLED_BYTES: Final = 16 << 20


async def with_images(chat: ChatRequest, context: RequestContext | None = None) -> ChatRequest:
    """Fetches a chat's images into the returned chat and into `context`. Raises ParameterError or DeadlineError, also
    if the model can read nothing of the question."""
    _check_question(chat.messages)
    urls = image_urls(chat.messages)
    if not urls:
        return chat
    images = dict(context.images) if context is not None else {}
    held_bytes = checked_bytes(urls, "messages", sum(map(len, images.values())))
    if missing := [url for url in dict.fromkeys(urls) if url.startswith(WEB) and url not in images]:
        from llamaclust.cluster.front.images.fetching import fetch_images

        images |= await fetch_images(missing, MAX_IMAGES_BYTES - held_bytes)
    if context is not None:
        context.images = images
        context.image_bytes = held_bytes + sum(len(images[url]) for url in missing)
    return replace(chat, images=images)


def _check_question(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ParameterError if the model can read nothing of the last messages of the user, which it is to answer."""
    question = [*takewhile(lambda message: message["role"] == "user", reversed(messages))]
    if question and all(isinstance(message.get("content"), Omission) for message in question):
        texts = "; ".join(str(message["content"]) for message in reversed(question))
        reason = f"the model can read nothing of the last message: {texts[:200]}"
        other_model = ", or use a model that reads images" if "[image omitted" in texts else ""
        raise ParameterError("messages", f"{reason}; add a text{other_model}")


def checked_bytes(urls: Sequence[str], param: str, fetched_bytes: int = 0) -> int:
    """Returns `fetched_bytes` plus the size of the images in data URLs. Raises ParameterError above the limits."""
    if len(urls) > MAX_IMAGES:
        raise ParameterError(param, f"expected at most {MAX_IMAGES} images in one request, found {len(urls)}")
    held_bytes = sum(map(_inline_bytes, urls)) + fetched_bytes
    if held_bytes > MAX_IMAGES_BYTES:
        reason = f"expected images of at most {MAX_IMAGES_BYTES} bytes in one request, found {held_bytes}"
        raise ParameterError(param, reason)
    return held_bytes


def _inline_bytes(url: str) -> int:
    return 0 if url.startswith(WEB) else (len(url) - url.find(",") - 1) * 3 // 4


def journalled(context: RequestContext, body: bytes) -> RequestContext:
    """Returns a copy of the context for the journal. The copy has no body if the images are too large."""
    if context.image_bytes <= MAX_JOURNALLED_BYTES:
        return replace(context, body=body)
    return replace(context, body=b"", earlier=(), images={}, idempotency_key="")


def check_restored(context: RequestContext) -> None:
    if context.image_bytes > MAX_JOURNALLED_BYTES:
        what = f"its images have {context.image_bytes} bytes, and the journal keeps at most {MAX_JOURNALLED_BYTES}"
        raise RequestFailedError(f"the coordinator was restarted, and this request is lost: {what}; send it again")
