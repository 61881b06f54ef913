"""Tests of the server's defaults of request fields with requests that exclude or need them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
_ANSWERED = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "A"}]}
_CHAT_PATH, _TEXT_PATH, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
_LOGPROBS = {"include": ["message.output_text.logprobs"]}


async def asked(path: str, fields: dict[str, Any], defaults: dict[str, Any]) -> tuple[str, list[GenerationRequest]]:
    """Returns the reply and the engine's requests."""
    engine = ScriptedEngine(says("a"))
    said: dict[str, Any] = {_TEXT_PATH: {"prompt": "a"}, _RESPONSES: {"input": "a"}}.get(path, CHAT)
    async with client(make_app(engine, defaults=defaults)) as http:
        reply = await http.post(path, json={"model": MODEL} | said | fields)
    assert reply.status_code == 200, reply.text
    return reply.text, [
        replace(request, request_id="", group="", seed=0, received_ns=0) for request in engine.submitted
    ]


@pytest.mark.parametrize(
    ("path", "defaults", "fields"),
    [
        (_CHAT_PATH, {"max_tokens": 5}, {"max_completion_tokens": 3}),
        (_CHAT_PATH, {"max_completion_tokens": 5}, {"n_predict": 3}),
        (_CHAT_PATH, {"min_tokens": 5}, {"max_completion_tokens": 3}),
        (_CHAT_PATH, {"max_tokens": 3}, {"min_tokens": 5}),
        (_CHAT_PATH, {"stream_options": {"include_usage": True}}, {}),
        (_CHAT_PATH, {"stream": True, "stream_options": {"include_usage": True}}, {"stream": False}),
        (_CHAT_PATH, {"top_logprobs": 2}, {}),
        (_CHAT_PATH, {"logprobs": True, "top_logprobs": 2}, {"logprobs": False}),
        (_CHAT_PATH, {"response_format": {"type": "json_object"}}, {"json_schema": _SCHEMA}),
        (_CHAT_PATH, {"response_format": {"type": "json_object"}}, {"json_schema": {}}),
        (_CHAT_PATH, {"grammar": 'root ::= "a"'}, {"guided_choice": ["a", "b"]}),
        (_CHAT_PATH, {"ignore_eos": True}, {"stop_token_ids": [5]}),
        (_CHAT_PATH, {"stop_token_ids": [5]}, {"ignore_eos": True, "max_tokens": 3}),
        (_CHAT_PATH, {"add_generation_prompt": True}, {"continue_final_message": True} | _ANSWERED),
        (_CHAT_PATH, {"tool_choice": "required"}, {}),
        (_TEXT_PATH, {"n": 2}, {"best_of": 1}),
        (_TEXT_PATH, {"n": 2, "best_of": 2}, {"n": 3}),
        (_TEXT_PATH, {"score_from": 1}, {"logprobs": 0}),
        (_RESPONSES, {"top_logprobs": 2}, {"include": ["reasoning.encrypted_content"]}),
        (_RESPONSES, {"store": False}, {"background": True}),
        ("/api/chat", {"top_logprobs": 2}, {}),
        ("/api/generate", {"system": "Be brief."}, {"prompt": "a", "raw": True}),
    ],
)
async def test_defaults_that_a_request_leaves_no_room_for_are_left_out(
    path: str, defaults: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Checks that the engine gets the same requests as without the defaults."""
    assert (await asked(path, fields, defaults))[1] == (await asked(path, fields, {}))[1]


@pytest.mark.parametrize(
    ("path", "defaults", "fields"),
    [
        (_CHAT_PATH, {"stream_options": {"include_usage": True}}, {"stream": True}),
        (_CHAT_PATH, {"top_logprobs": 2}, {"logprobs": True}),
        (_CHAT_PATH, {"logprobs": True, "top_logprobs": 2}, {}),
        (_CHAT_PATH, {"guided_choice": ["a"]}, {"response_format": {"type": "text"}}),
        (_CHAT_PATH, {"guided_choice": ["a"]}, {"structured_outputs": {}}),
        (_CHAT_PATH, {"stop_token_ids": [5]}, {"ignore_eos": False}),
        (_TEXT_PATH, {"n": 2}, {"best_of": 2}),
        (_RESPONSES, {"top_logprobs": 2}, _LOGPROBS),
    ],
)
async def test_defaults_that_a_request_leaves_room_for_have_an_effect(
    path: str, defaults: dict[str, Any], fields: dict[str, Any]
) -> None:
    text, by_default = await asked(path, fields, defaults)
    assert by_default == (await asked(path, defaults | fields, {}))[1]
    assert ('"usage":{' in text) or "stream_options" not in defaults
