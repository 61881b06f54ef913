"""Tests LiteLLM with its provider for OpenAI's API."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "Say hello."}]


class City(BaseModel):
    name: str
    is_capital: bool


@pytest.fixture
def body(api: str, model: str) -> dict[str, Any]:
    server = {"api_base": f"{api}/v1", "api_key": "none"}
    return {"model": f"openai/{model}", "messages": HELLO, "max_tokens": 8, "num_retries": 0, **server}


def test_chat(body: dict[str, Any]) -> None:
    assert litellm.completion(**body).choices[0].message.content


def test_a_stream(body: dict[str, Any]) -> None:
    parts = litellm.completion(**body, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


async def test_asynchronous_chat(body: dict[str, Any]) -> None:
    assert (await litellm.acompletion(**body)).choices[0].message.content


@pytest.mark.parametrize("provider", ["hosted_vllm", "llamafile", "lm_studio"])
def test_other_providers(body: dict[str, Any], model: str, provider: str) -> None:
    assert litellm.completion(**{**body, "model": f"{provider}/{model}"}).choices


def test_text(body: dict[str, Any], model: str) -> None:
    del body["messages"]
    reply = litellm.text_completion(**{**body, "model": f"text-completion-openai/{model}"}, prompt="Once")
    assert reply.choices[0].text


def test_choices_with_logprobs(body: dict[str, Any]) -> None:
    reply = litellm.completion(**body, n=2, logprobs=True, top_logprobs=3)
    assert len(reply.choices) == 2


def test_response_formats(body: dict[str, Any]) -> None:
    reply = litellm.completion(**{**body, "max_tokens": 200}, response_format=City)
    assert City.model_validate_json(reply.choices[0].message.content)


def test_embeddings(api: str, model: str) -> None:
    reply = litellm.embedding(model=f"openai/{model}", input=["one"], api_base=f"{api}/v1", api_key="none")
    assert reply.data


def test_responses(api: str, model: str) -> None:
    assert litellm.responses(
        model=f"openai/{model}", input="Hello", api_base=f"{api}/v1", api_key="none", max_output_tokens=16
    ).output


def test_a_full_context_is_recognised(body: dict[str, Any]) -> None:
    body["messages"] = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**body)
