"""Tests OpenAI's Python client with each kind of request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

HELLO: Any = [{"role": "user", "content": "Say hello."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class City(BaseModel):
    name: str
    is_capital: bool


@pytest.fixture
def client(api: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def asynchronous(api: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8)
    assert reply.choices[0].message.content
    assert reply.usage and 0 < reply.usage.completion_tokens <= 8


def test_chat_stream(client: openai.OpenAI, model: str) -> None:
    chunks = [*client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def test_asynchronous_chat_stream(asynchronous: openai.AsyncOpenAI, model: str) -> None:
    stream = await asynchronous.chat.completions.create(model=model, messages=HELLO, max_tokens=8, stream=True)
    assert [chunk async for chunk in stream]


@pytest.mark.parametrize("options", [{}, {"continuous_usage_stats": True}], ids=["final", "continuous"])
def test_usage_of_a_stream(client: openai.OpenAI, model: str, options: Any) -> None:
    options = {"include_usage": True, **options}
    chunks = [
        *client.chat.completions.create(model=model, messages=HELLO, max_tokens=4, stream=True, stream_options=options)
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 4


def test_raw_reply(client: openai.OpenAI, model: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO, max_tokens=2)
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse().object == "chat.completion"


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=20)
    entries = reply.choices[0].logprobs
    assert entries and entries.content and all(len(entry.top_logprobs) == 20 for entry in entries.content)


def test_seed_and_several_choices(client: openai.OpenAI, model: str) -> None:
    body: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 8, "n": 3, "seed": 7, "temperature": 1.0}
    first, second = (client.chat.completions.create(**body) for _ in range(2))
    assert [choice.message.content for choice in first.choices] == [choice.message.content for choice in second.choices]
    assert len(first.choices) == 3


@pytest.mark.parametrize(
    "hint",
    [
        {"store": True},
        {"reasoning_effort": "low"},
        {"verbosity": "low"},
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"prediction": {"type": "content", "content": "hello"}},
        {"extra_body": {"repeat_penalty": 1.1, "top_k": 5, "min_p": 0.1}},
        {"extra_body": {"a_field_of_tomorrow": 1}},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"5": -100}},
        {"max_completion_tokens": 4, "max_tokens": openai.NOT_GIVEN},
        {"stop": ["\n\n", "."]},
    ],
    ids=lambda hint: "-".join(hint),
)
def test_fields(client: openai.OpenAI, model: str, hint: dict[str, Any]) -> None:
    body: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 4, **hint}
    assert client.chat.completions.create(**body).choices


def test_roles_parts_and_names(client: openai.OpenAI, model: str) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ada", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {"role": "assistant", "content": "Three", "refusal": None},
        {"role": "user", "content": "Four"},
    ]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=4).choices


def test_a_reply_that_is_sent_back(client: openai.OpenAI, model: str) -> None:
    message = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4).choices[0].message
    messages: Any = [*HELLO, message, {"role": "user", "content": "Go on."}]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=4).choices


def test_parsed_replies(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.parse(model=model, messages=HELLO, max_tokens=200, response_format=City)
    assert isinstance(reply.choices[0].message.parsed, City)


def test_a_parsed_stream(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=HELLO, max_tokens=200, response_format=City) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_json_objects(client: openai.OpenAI, model: str) -> None:
    form: Any = {"type": "json_object"}
    reply = client.chat.completions.create(model=model, messages=HELLO, max_tokens=64, response_format=form)
    choice = reply.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize("choice", ["none", "auto", "required", NAMED], ids=["none", "auto", "required", "named"])
def test_tools(client: openai.OpenAI, model: str, choice: Any) -> None:
    body: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "max_tokens": 100,
        "tools": [WEATHER],
        "tool_choice": choice,
    }
    message = client.chat.completions.create(**body).choices[0].message
    if choice in ("required", NAMED):
        assert message.tool_calls
        assert [*json.loads(message.tool_calls[0].function.arguments)] == ["city"]
    if choice == "none":
        assert not message.tool_calls


def test_a_stream_of_tools(client: openai.OpenAI, model: str) -> None:
    body: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "max_tokens": 100,
        "tools": [WEATHER],
        "tool_choice": "required",
    }
    with client.chat.completions.stream(**body) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert message.tool_calls and "city" in json.loads(message.tool_calls[0].function.arguments)


def test_results_of_tools(client: openai.OpenAI, model: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=8, tools=[WEATHER]).choices


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Once"},
        {"prompt": ["Once", "Twice"]},
        {"prompt": [20, 30, 40]},
        {"prompt": [[20, 30], [40]]},
        {"prompt": "Once", "echo": True, "logprobs": 3},
        {"prompt": "Once", "n": 2, "best_of": 2},
        {"prompt": "Once", "logprobs": 0},
    ],
    ids=["text", "texts", "tokens", "lists of tokens", "echo", "best of", "logprobs"],
)
def test_completions(client: openai.OpenAI, model: str, body: dict[str, Any]) -> None:
    assert client.completions.create(model=model, max_tokens=4, **body).choices


def test_a_stream_of_completions(client: openai.OpenAI, model: str) -> None:
    assert [*client.completions.create(model=model, prompt="Once", max_tokens=4, stream=True)]


def test_models(client: openai.OpenAI, model: str) -> None:
    assert model in [entry.id for entry in client.models.list()]
    assert client.models.retrieve(model).id == model


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings(client: openai.OpenAI, model: str, form: Any) -> None:
    reply = client.embeddings.create(model=model, input=["one", "two"], encoding_format=form)
    assert len(reply.data) == 2 and len(reply.data[0].embedding) > 0


def test_responses(client: openai.OpenAI, model: str) -> None:
    reply = client.responses.create(model=model, instructions="Be brief.", input="Hello", max_output_tokens=16)
    assert reply.output_text
    assert reply.usage and reply.usage.output_tokens > 0


def test_a_stream_of_responses(client: openai.OpenAI, model: str) -> None:
    body: Any = {"model": model, "input": "Hello", "max_output_tokens": 400, "temperature": 0}
    with client.responses.stream(**body) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds
    assert final.output_text


def test_responses_with_tools(client: openai.OpenAI, model: str) -> None:
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    reply = client.responses.create(
        model=model, input="Weather?", tools=[tool], tool_choice="required", max_output_tokens=100
    )
    calls = [item for item in reply.output if item.type == "function_call"]
    assert calls and "city" in json.loads(calls[0].arguments)


def test_parsed_responses(client: openai.OpenAI, model: str) -> None:
    reply = client.responses.parse(model=model, input="A city", text_format=City, max_output_tokens=200)
    assert isinstance(reply.output_parsed, City)


def test_a_response_in_the_background(client: openai.OpenAI, model: str) -> None:
    body: Any = {"model": model, "input": "Hello", "background": True, "max_output_tokens": 16}
    with client.responses.create(**body, stream=True) as stream:
        first = next(iter(stream))
    events = [*client.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number)]
    assert events[0].sequence_number == first.sequence_number + 1
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert client.responses.retrieve(first.response.id).output_text


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"messages": []}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, openai.BadRequestError),
        ({"messages": [{"role": "nobody", "content": "x"}]}, openai.BadRequestError),
    ],
    ids=["no message", "temperature", "context", "role"],
)
def test_errors(client: openai.OpenAI, model: str, body: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        client.chat.completions.create(**{"model": model, "messages": HELLO, **body})


def test_an_unknown_path_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.files.list()
