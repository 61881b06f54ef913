from __future__ import annotations

import json
from typing import Any

import ollama
import pytest

HELLO = [{"role": "user", "content": "Say hello."}]
FEW = {"num_predict": 8}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
def client(api: str) -> ollama.Client:
    return ollama.Client(host=api)


def test_chat(client: ollama.Client, model: str) -> None:
    reply = client.chat(model=model, messages=HELLO, options=FEW)
    assert reply.message.content and reply.done and reply.eval_count


def test_a_stream_of_chat(client: ollama.Client, model: str) -> None:
    parts = [*client.chat(model=model, messages=HELLO, options=FEW, stream=True)]
    assert "".join(part.message.content or "" for part in parts) and parts[-1].done


async def test_asynchronous_chat(api: str, model: str) -> None:
    reply = await ollama.AsyncClient(host=api).chat(model=model, messages=HELLO, options=FEW)
    assert reply.message.content


def test_generate(client: ollama.Client, model: str) -> None:
    assert client.generate(model=model, prompt="Once", options=FEW).response


def test_raw_generate(client: ollama.Client, model: str) -> None:
    assert client.generate(model=model, prompt="Once", raw=True, options=FEW).response


def test_formats(client: ollama.Client, model: str) -> None:
    reply = client.chat(model=model, messages=HELLO, format=SCHEMA, options={"num_predict": 100})
    assert [*json.loads(reply.message.content or "")] == ["name"]


def test_tools(client: ollama.Client, model: str) -> None:
    def get_weather(city: str) -> str:
        """The weather.

        Args:
            city: its name
        """
        return city

    assert client.chat(model=model, messages=HELLO, tools=[get_weather], options=FEW).message


def test_thinking(client: ollama.Client, model: str) -> None:
    assert client.chat(model=model, messages=HELLO, think=False, options=FEW).message


def test_keep_alive(client: ollama.Client, model: str) -> None:
    assert client.generate(model=model, prompt="Once", keep_alive="5m", options=FEW).done


def test_lists(client: ollama.Client, model: str) -> None:
    assert any(model in (entry.model or "") for entry in client.list().models)
    assert client.ps().models


def test_show(client: ollama.Client, model: str) -> None:
    shown = client.show(model)
    assert shown.details and shown.modelinfo


def test_embed(client: ollama.Client, model: str) -> None:
    assert len(client.embed(model=model, input=["one", "two"]).embeddings) == 2


def test_an_unknown_model(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError):
        client.show("no-such-model")
