"""Checks that the OpenAI endpoints name the fields that they refuse, and tests reports of failures."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.core.errors import QueueFullError, WorkerError
from support.clusters.served import (
    CONTEXT,
    VOCABULARY,
    ScriptedEngine,
    client,
    events_of,
    make_app,
    real_engine,
    says,
)
from support.paths import ROOT

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ANSWER = "The cat sat."
HTTP_API = ROOT / "docs/api.md"


async def post(path: str, body: Any, engine: ScriptedEngine | None = None) -> httpx.Response:
    async with client(make_app(engine or ScriptedEngine(says(ANSWER)))) as http:
        return await http.post(path, json=body) if isinstance(body, dict) else await http.post(path, content=body)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"google_search": {}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL | {"function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [TOOL | {"function": {"name": "f", "parameters": [1]}}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"reasoning_format": "x"}, "reasoning_format"),
        ({"reasoning_budget": -2}, "reasoning_budget"),
        ({"reasoning_budget": 1, "reasoning_budget_message": "m" * 2049}, "reasoning_budget_message"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"grammar": "root ::= a"}, "grammar"),
        ({"json_schema": 3}, "json_schema"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"mirostat": 3}, "mirostat"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"samplers": ["mirostat"]}, "samplers"),
        ({"best_of": 2}, "best_of"),
        ({"logits_processors": ["a"]}, "logits_processors"),
        ({"guided_json": "{"}, "guided_json"),
        ({"min_keep": 3}, "min_keep"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"n_predict": 3, "max_tokens": 4}, "n_predict"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 1_000_000}, "stop"),
        ({"stop_token_ids": [5000]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "system", "name": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "txt", "text": "a"}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [TOOL]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "content": "a"}] * 2}, "messages"),
    ],
)
async def test_chat_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine(says("a"))
    reply = await post("/v1/chat/completions", CHAT | fields, engine)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and error["message"].startswith(param)
    assert error["type"] == "invalid_request_error" and error["code"]
    assert len(error["message"]) < 500
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 3}, "n"),
        ({"prompt": [1] * (CONTEXT + 1)}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"ignore_eos": True, "stop_token_ids": [4]}, "stop_token_ids"),
    ],
)
async def test_completion_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine(says("a"))
    reply = await post("/v1/completions", {"prompt": "a"} | fields, engine)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert engine.running == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 129}, "n: requests 129 answers; the limit is 128"),
        ({"prompt": ["a"] * 64, "n": 3}, "n: requests 192 answers to 64 prompts; the limit is 128"),
    ],
)
async def test_too_many_answers_are_counted_for_the_user(fields: dict[str, Any], message: str) -> None:
    reply = await post("/v1/completions", {"prompt": "a"} | fields)
    assert reply.status_code == 400 and reply.json()["error"]["message"] == message


async def test_tokens_that_may_neither_come_nor_end_the_answer_are_refused() -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        every = {"prompt": "a", "max_tokens": 9, "stop_token_ids": list(range(VOCABULARY))}
        reply = await http.post("/v1/completions", json=every | {"min_tokens": 5})
        assert reply.status_code == 400 and "none is left" in reply.json()["error"]["message"]
        assert (await http.post("/v1/completions", json=every)).json()["choices"][0]["finish_reason"] == "stop"


async def test_the_error_of_a_too_long_prompt_has_both_lengths() -> None:
    reply = await post("/v1/completions", {"prompt": [1] * (CONTEXT + 7)})
    error = reply.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"has {CONTEXT + 7} tokens" in error["message"]
    assert f"this model's maximum context length is {CONTEXT} tokens" in error["message"], "litellm looks for that"
    assert "the model allows no more; shorten it" in error["message"]


async def test_clients_of_llamacpp_get_its_error_of_a_too_long_prompt() -> None:
    for path, body in (
        ("/completion", {"prompt": [1] * (CONTEXT + 7)}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "x " * 3000}]}),
    ):
        reply = await post(path, body)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", CONTEXT)
        assert error["n_prompt_tokens"] > CONTEXT


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"{",
        b'{"prompt": "a" "b"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"prompt": [' + b"9" * 10_000 + b"]}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "messages": [], "content": "a", "response_format": {"type": "text", "x": NaN}}',
        b'{"prompt": "a", "messages": [], "content": "a", "of_no_effect": [{"x": 0.5, "y": [1, -1e999]}]}',
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 4000 + b"}",
    ],
)
async def test_bodies_that_are_no_request(body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/completion", "/tokenize"):
        reply = await post(path, body)
        assert reply.status_code == 400, (path, reply.text)
        assert len(reply.json()["error"]["message"]) < 500


async def test_numbers_that_no_reply_could_show_are_named() -> None:
    reply = await post("/v1/responses", b'{"input": "x", "text": {"format": {"type": "text", "x": [1, 1e999]}}}')
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "text.format.x[1]" and "finite" in error["message"]


async def test_neutral_fields_are_taken() -> None:
    neutral = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "logit_bias": {},
        "best_of": 1,
        "mirostat": 0,
        "typical_p": 1.0,
        "dry_multiplier": 0,
        "grammar": "",
        "temperature": None,
        "stop": [],
        "reasoning_effort": "medium",
        "verbosity": "medium",
    }
    assert (await post("/v1/chat/completions", CHAT | neutral)).status_code == 200
    body = {"prompt": "a", "best_of": 2, "n": 2, "suffix": None, "echo": False}
    assert (await post("/v1/completions", body)).status_code == 200


@pytest.mark.parametrize("limit", [-1, 0])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", CHAT),
        ("/api/chat", CHAT),
        ("/api/generate", {"prompt": "a"}),
        ("/completion", {"prompt": "a"}),
    ],
)
async def test_limits_that_are_off_are_taken_by_each_endpoint(path: str, body: dict[str, Any], limit: int) -> None:
    off = {"t_max_predict_ms": limit, "t_max_prompt_ms": limit, "n_indent": 0}
    options = {"options": off} if path.startswith("/api") else {}
    reply = await post(path, {"model": "tiny"} | body | off | options)
    assert reply.status_code == 200 and HEADER not in reply.headers, reply.text


def documented_no_ops() -> list[str]:
    item = re.search(r"^- \*\*No-ops\*\*.*?(?=^- )", HTTP_API.read_text(), re.MULTILINE | re.DOTALL)
    assert item is not None
    return re.findall(r"`(\w+)`", item[0])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
async def test_documented_no_ops_are_taken_by_each_endpoint(path: str) -> None:
    fields = documented_no_ops()
    assert {"n_discard", "n_keep", "user"} <= {*fields}
    body = CHAT if "chat" in path else {"prompt": "a"}
    for value in (True, 7, "x", {"a": [1]}):
        reply = await post(path, body | dict.fromkeys(fields, value))
        assert reply.status_code == 200, reply.text
        assert HEADER not in reply.headers


async def test_failures_have_their_status() -> None:
    full = ScriptedEngine(says("a"), refusal=QueueFullError("256 sequences wait", 2.5))
    reply = await post("/v1/completions", {"prompt": "a"}, full)
    assert reply.status_code == 429 and reply.headers["retry-after"] == "3"
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    for stream in (False, True):
        lost = ScriptedEngine(says("a"), failure=WorkerError("worker b (layers 3-5) is gone"))
        reply = await post("/v1/completions", {"prompt": "a", "stream": stream}, lost)
        assert reply.status_code == 503 and "layers 3-5" in reply.json()["error"]["message"]
        assert lost.running == 0


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/completions", {"error": {"type": "server_error", "code": "internal_error"}}),
        ("/v1/messages", {"type": "error", "error": {"type": "api_error", "code": "internal_error"}}),
        ("/api/generate", {"error": "internal error; the coordinator's log says more"}),
    ],
)
async def test_an_error_of_ours_has_the_form_of_the_requests_api(path: str, shown: dict[str, Any]) -> None:
    def script(generation: object) -> list[int]:
        raise ZeroDivisionError

    body = {"model": "tiny", "prompt": "Hi", "messages": CHAT["messages"], "max_tokens": 3}
    transport = httpx.ASGITransport(make_app(ScriptedEngine(script)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as http:
        reply = await http.post(path, json=body)
    error = reply.json()
    assert reply.status_code == 500
    if isinstance(error["error"], dict):
        error["error"] = {name: error["error"][name] for name in ("type", "code")}
    assert error == shown


async def test_a_failure_in_a_stream_is_its_last_event() -> None:
    engine = ScriptedEngine(says(ANSWER), failure=WorkerError("worker b (layers 3-5) is gone"), failure_after=3)
    reply = await post("/v1/chat/completions", CHAT | {"stream": True}, engine)
    events = events_of(reply.text)
    assert reply.status_code == 200 and len(events) > 2
    assert events[-1]["error"]["code"] == "worker_failed" and "layers 3-5" in events[-1]["error"]["message"]
    assert "[DONE]" not in events
    assert engine.running == 0


@pytest.mark.parametrize(("field", "named"), [("", "?"), ("\x00\r", "??"), (" ", "?"), ("0" * 199, "0" * 160)])
async def test_names_of_ignored_fields_make_a_header(field: str, named: str) -> None:
    """Checks the header's value, which must not begin or end with white space."""
    reply = await post("/v1/completions", {"prompt": "a", "max_tokens": 1, field: 1})
    assert (reply.status_code, reply.headers[HEADER]) == (200, named)
