"""Tests of other languages' values: [] for an empty object, the largest number for no limit, null for no text."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.cluster.front.dialects.anthropic.schema import MessagesBody
from llamaclust.cluster.front.dialects.llamacpp.completions import LlamaCppBody
from llamaclust.cluster.front.dialects.ollama.schema import OllamaChatBody
from llamaclust.cluster.front.dialects.openai.response_schema import ResponsesBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.schema import Body, read_fields
from llamaclust.core.errors import ParameterError

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
NO_LIMITS = (1 << 31) - 1, (1 << 31), (1 << 53) - 1, (1 << 63) - 1, 1e9, -1


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize("most", NO_LIMITS)
def test_the_largest_number_is_no_limit(most: float) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        assert read_fields(ChatBody, {**HELLO, name: most}).request().answer.max_new_tokens is None
    assert read_fields(CompletionBody, {"prompt": "x", "max_tokens": most}).requests()[0].max_new_tokens is None
    assert read_fields(MessagesBody, {**HELLO, "max_tokens": most}).max_tokens is None
    assert read_fields(ResponsesBody, {"input": "x", "max_output_tokens": most}).max_output_tokens is None
    assert read_fields(LlamaCppBody, {"prompt": "x", "n_predict": most}).max_new_tokens is None
    assert (
        read_fields(OllamaChatBody, {"model": "m", **HELLO, "options": {"num_predict": most}}).options.num_predict == -1
    )


@pytest.mark.parametrize("name", ["logit_bias", "chat_template_kwargs", "stream_options"])
def test_an_empty_list_is_an_empty_object(name: str) -> None:
    more = {"stream": True} if name == "stream_options" else {}
    assert read_fields(ChatBody, {**HELLO, **more, name: []}) == read_fields(ChatBody, {**HELLO, **more, name: {}})
    with pytest.raises(ParameterError, match=name):
        read_fields(ChatBody, {**HELLO, **more, name: [1]})


def test_empty_lists_in_other_bodies() -> None:
    assert read_fields(OllamaChatBody, {"model": "m", **HELLO, "options": []}) == read_fields(
        OllamaChatBody, {"model": "m", **HELLO}
    )
    assert read_fields(ResponsesBody, {"input": "x", "metadata": []}).metadata == {}
    assert read_fields(ChatBody, {**HELLO, "stop": [], "tools": []}).stop == ()


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ChatBody, "stream_options", {"include_usage": True, "include_obfuscation": None}),
        (ResponsesBody, "text", {"format": None, "verbosity": "low"}),
        (ResponsesBody, "reasoning", {"effort": None, "odd": None}),
        (MessagesBody, "output_config", {"effort": None}),
    ],
)
def test_null_counts_as_absent_within_objects(kind: type[Body], name: str, value: dict[str, Any]) -> None:
    body = {"input": "x"} if kind is ResponsesBody else HELLO
    without = {field: each for field, each in value.items() if each is not None}
    assert read_fields(kind, {**body, "stream": True, name: value}) == read_fields(
        kind, {**body, "stream": True, name: without}
    )


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ([], {"type": "object", "properties": {}}),
        ({"type": "object", "properties": []}, {"type": "object", "properties": {}}),
        (
            {"type": "object", "properties": {"a": {"type": "object", "properties": []}, "b": []}, "required": []},
            {"type": "object", "properties": {"a": {"type": "object", "properties": {}}, "b": {}}, "required": []},
        ),
        (
            {"$defs": [], "anyOf": [{"properties": [], "default": {"properties": []}}]},
            {"$defs": {}, "anyOf": [{"properties": {}, "default": {"properties": []}}]},
        ),
    ],
)
def test_empty_lists_in_schemas_of_tools(parameters: Any, expected: Any) -> None:
    body = read_fields(ChatBody, {**HELLO, "tools": [tool(parameters)]})
    assert body.tools[0].function["function"]["parameters"] == expected


@pytest.mark.parametrize("arguments", ["[]", [], "", None, {}])
def test_arguments_of_a_call_without_any(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*HELLO["messages"], {"role": "assistant", "tool_calls": [call]}]
    read = read_fields(ChatBody, {"messages": [*messages, {"role": "tool", "tool_call_id": "1", "content": None}]})
    assert read.variables[1]["tool_calls"][0]["function"]["arguments"] == "{}"
    assert read.variables[2]["content"] == ""


def test_results_of_tools_without_text() -> None:
    uses = [{"type": "tool_use", "id": "1", "name": "f", "input": []}]
    results = [{"type": "tool_result", "tool_use_id": "1", "content": None}]
    turns = [*HELLO["messages"], {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
    assert read_fields(MessagesBody, {"messages": turns, "max_tokens": 9}).request().messages[-1]["content"] == ""
    items = [
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "[]"},
        {"type": "function_call_output", "call_id": "1", "output": None},
    ]
    read_fields(ResponsesBody, {"input": items})
    ollama = [*HELLO["messages"], {"role": "tool", "tool_name": "f", "content": None}]
    assert read_fields(OllamaChatBody, {"model": "m", "messages": ollama}).messages[-1].content == ""
