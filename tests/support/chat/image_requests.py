"""Requests with one image for each API that takes images."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any

Body = dict[str, Any]


def _parts(url: str) -> list[Body]:
    return [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]


def _chat(url: str) -> Body:
    return {"messages": [{"role": "user", "content": _parts(url)}], "max_tokens": 1}


def _responses(url: str) -> Body:
    content = [{"type": "input_image", "image_url": url}]
    return {"input": [{"role": "user", "content": content}], "max_output_tokens": 1}


def _messages(url: str) -> Body:
    head, _, data = url.partition(";base64,")
    source = {"type": "base64", "media_type": head.removeprefix("data:"), "data": data}
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}], "max_tokens": 1}


def _ollama_chat(url: str) -> Body:
    return {
        "messages": [{"role": "user", "content": "a", "images": [url.partition(",")[2]]}],
        "options": {"num_predict": 1},
    }


def _generate(url: str) -> Body:
    return {"prompt": "a", "images": [url.partition(",")[2]], "options": {"num_predict": 1}}


def _completion(url: str) -> Body:
    prompt = {"prompt_string": "a<__media__>", "multimodal_data": [url.partition(",")[2]]}
    return {"prompt": prompt, "n_predict": 1}


_BODIES: Mapping[str, Callable[[str], Body]] = {
    "/v1/chat/completions": _chat,
    "/v1/responses": _responses,
    "/v1/messages": _messages,
    "/api/chat": _ollama_chat,
    "/api/generate": _generate,
    "/completion": _completion,
}
PATHS = tuple(_BODIES)


def body_of(path: str, image: bytes, *, model: str, stream: bool, media_type: str = "image/png") -> Body:
    url = f"data:{media_type};base64,{b64encode(image).decode()}"
    return {"model": model, **_BODIES[path](url), "stream": stream}


def error_of(reply: str) -> str:
    """Returns the error message of a whole or streamed reply of any API, or an empty text without an error."""
    for line in reply.splitlines():
        data = line.removeprefix("data: ")
        error = json.loads(data).get("error") if data.startswith("{") else None
        if error:
            message: str = error if isinstance(error, str) else error["message"]
            return message
    return ""
