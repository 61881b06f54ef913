"""Tests LiteLLM's requests with images, with providers for three APIs."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACgAAAAeAQMAAABkE86eAAAABlBMVEXcKB4UPMh8jxkjAAAAFklEQVR42mNgYOD//5+J"
    "gYGBgWGokAB9JwJIyoDJugAAAABJRU5ErkJggg=="
)
WEBP = "data:image/webp;base64,UklGRjQAAABXRUJQVlA4TCcAAAAvJ0AHACCTtvFZ7dUzdm7fFfSHov9kkzZJuvcOC2Kw+3LH7I7hzDMA"
LEAST_ROWS = 16
PROVIDERS = {"openai": "/v1", "hosted_vllm": "/v1", "lm_studio": "/v1", "anthropic": "", "ollama_chat": ""}
"""The last part of each provider's base URL."""


@pytest.fixture(params=PROVIDERS)
def body(request: pytest.FixtureRequest, api: str, model: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in (PNG, WEBP)]
    content = [{"type": "text", "text": "What is this?"}, *images]
    server = {"model": f"{request.param}/{model}", "api_base": api + PROVIDERS[request.param], "api_key": "none"}
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "num_retries": 0, **server}


def test_chat(body: dict[str, Any]) -> None:
    assert litellm.completion(**body).usage.prompt_tokens > 2 * LEAST_ROWS


def test_a_stream(body: dict[str, Any]) -> None:
    whole = litellm.completion(**body).choices[0].message.content
    parts = litellm.completion(**body, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole


def test_a_refusal(body: dict[str, Any]) -> None:
    body["messages"][0]["content"][1]["image_url"]["url"] = PNG[:90]
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**body)
