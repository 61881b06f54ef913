from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(api: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=api, api_key="none", max_retries=0) as made:
        yield made


def test_messages(client: anthropic.Anthropic, model: str) -> None:
    reply = client.messages.create(model=model, messages=HELLO, max_tokens=8, system="Be brief.")
    assert reply.content[0].type == "text" and reply.content[0].text
    assert 0 < reply.usage.output_tokens <= 8


def test_a_stream_of_messages(client: anthropic.Anthropic, model: str) -> None:
    with client.messages.stream(model=model, messages=HELLO, max_tokens=8) as stream:
        assert "".join(stream.text_stream)
        assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")


def test_events(client: anthropic.Anthropic, model: str) -> None:
    kinds = [event.type for event in client.messages.create(model=model, messages=HELLO, max_tokens=8, stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "named"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tools(client: anthropic.Anthropic, model: str, choice: Any, streamed: bool) -> None:
    body = {"model": model, "messages": HELLO, "max_tokens": 100, "tools": [WEATHER], "tool_choice": choice}
    if streamed:
        with client.messages.stream(**body) as stream:
            reply = stream.get_final_message()
    else:
        reply = client.messages.create(**body)
    calls = [block for block in reply.content if block.type == "tool_use"]
    assert calls and [*calls[0].input] == ["city"]
    assert reply.stop_reason == "tool_use"


def test_results_of_tools(client: anthropic.Anthropic, model: str) -> None:
    messages: list[Any] = [
        *HELLO,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "x"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "sunny"}]},
    ]
    assert client.messages.create(model=model, messages=messages, max_tokens=8, tools=[WEATHER]).content


def test_counted_tokens(client: anthropic.Anthropic, model: str) -> None:
    assert client.messages.count_tokens(model=model, messages=HELLO).input_tokens > 0


def test_cache_control_is_accepted(client: anthropic.Anthropic, model: str) -> None:
    system: list[Any] = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert client.messages.create(model=model, messages=HELLO, max_tokens=4, system=system).content


def test_models(client: anthropic.Anthropic, model: str) -> None:
    assert model in [entry.id for entry in client.models.list()]


def test_errors(client: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=model, messages=[], max_tokens=8)
