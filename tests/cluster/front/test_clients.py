"""Tests of clients' extras: alternative paths, headers, fields of other servers."""

from __future__ import annotations

import gzip
import json
import logging
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.text import service as service_module
from support.clusters.served import (
    CONTEXT,
    MODEL,
    ScriptedEngine,
    chat_template,
    client,
    events_of,
    make_app,
    says,
)

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ANSWER = "The cat sat."


async def post(
    path: str, body: dict[str, Any], engine: ScriptedEngine | None = None, **settings: Any
) -> httpx.Response:
    async with client(make_app(engine or ScriptedEngine(says(ANSWER)), **settings)) as http:
        return await http.post(path, json=body)


async def complete(**fields: Any) -> ScriptedEngine:
    """Returns the engine after a completion."""
    engine = ScriptedEngine(says(ANSWER))
    reply = await post("/v1/completions", {"prompt": "a"} | fields, engine)
    assert reply.status_code == 200, reply.text
    return engine


# -- paths and methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/llm", "/a/b"])
async def test_paths_with_a_prefix_and_without_v1(prefix: str) -> None:
    async with client(make_app(ScriptedEngine(says(ANSWER)), prefix=prefix)) as http:
        for path, body in (("/chat/completions", CHAT), ("/completions", {"prompt": "a", "model": MODEL})):
            short = await http.post(prefix + path, json=body)
            full = await http.post(f"{prefix}/v1{path}", json=body)
            assert short.status_code == full.status_code == 200
            assert short.json()["object"] == full.json()["object"]
        for path in ("/models", "/v1/models", f"/models/{MODEL}", "/health", "/v1/health", "/props", "/metrics"):
            assert (await http.get(prefix + path)).status_code == 200, path
        assert (await http.get("/health")).status_code == 200, "for probes"
        assert (await http.get(prefix + "/nothing")).status_code == 404


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_path_with_a_slash_at_its_end_is_no_redirect(prefix: str) -> None:
    """Checks for no redirect: it would need a proxy's public address, and clients may not send the body again."""
    async with client(make_app(ScriptedEngine(says(ANSWER)), prefix=prefix)) as http:
        for path in ("/v1/chat/completions/", "/chat/completions/"):
            assert (await http.post(prefix + path, json=CHAT)).status_code == 200, path
        for path in ("/v1/models/", "/models/", f"/v1/models/{MODEL}/", "/health/", "/api/tags/", "/"):
            assert (await http.get(prefix + path)).status_code == 200, path
        for path in ("/nothing/", "/v1/models//"):
            assert (await http.get(prefix + path)).status_code == 404, path


async def test_completions_without_v1_are_llamacpps_unless_the_body_names_a_model() -> None:
    for fields in ({}, {"stream": True}, {"unknown": "x" * 70_000}):
        own, openai = [
            (await post("/completions", {"prompt": "a", **fields, **model})).text for model in ({}, {"model": "any"})
        ]
        null = (await post("/completions", {"prompt": "a", **fields, "model": None})).text
        assert ('"content"' in null, '"choices"' in null) == (True, False)
        assert ('"content"' in own, '"choices"' in own) == (True, False)
        assert ('"content"' in openai, '"choices"' in openai) == (False, True)
    assert (await post("/completions", {})).status_code == 400
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        assert (await http.post("/completions", content=b"[1]")).status_code == 400


async def test_head_wherever_get() -> None:
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        for path in ("/health", "/v1/models", "/props", "/metrics"):
            assert (await http.head(path)).status_code == 200
        assert (await http.head("/v1/completions")).status_code == 405


async def test_options_without_a_preflight_names_the_methods() -> None:
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        methods = {"/v1/completions": "POST", "/models": "GET, HEAD", "/v1/streams/a": "DELETE, GET, HEAD"}
        for path, allowed in methods.items():
            reply = await http.options(path)
            assert reply.status_code == 204 and reply.headers["allow"] == allowed
        assert (await http.options("/nothing")).status_code == 404


async def test_keys_in_either_header() -> None:
    async with client(make_app(ScriptedEngine(says("a")), api_keys=("first-key",))) as http:
        for headers, status in (
            ({"X-Api-Key": "first-key"}, 200),
            ({"Authorization": "Bearer first-key"}, 200),
            ({"Authorization": "Bearer first-key", "X-Api-Key": "other"}, 200),
            ({"Authorization": "Bearer other", "X-Api-Key": "first-key"}, 401),
            ({"X-Api-Key": "other"}, 401),
            ({"X-Api-Key": ""}, 401),
        ):
            assert (await http.get("/v1/models", headers=headers)).status_code == status, headers
        assert (await http.get("/v1/models?key=first-key")).status_code == 401, "URLs are logged"


async def test_errors_of_each_api() -> None:
    async with client(make_app(ScriptedEngine(says("a")), api_keys=("first-key",))) as http:
        types = {
            path: (await http.get(path, headers={"X-Api-Key": "first-key"})).json()["error"]["type"]
            for path in ("/v1/nothing", "/nothing")
        }
        assert types == {"/v1/nothing": "invalid_request_error", "/nothing": "not_found_error"}
        assert (await http.get("/props")).json()["error"]["type"] == "authentication_error"


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "settings", "status"),
    [
        ("/v1/chat/completions", {}, 404),
        ("/chat/completions", {}, 200),
        ("/chat/completions", {"strict_model": True}, 404),
        ("/v1/chat/completions", {"strict_model": False}, 200),
        ("/v1/chat/completions", {"aliases": ("gpt-4o-mini",)}, 200),
    ],
)
async def test_models_that_a_request_may_name(path: str, settings: dict[str, Any], status: int) -> None:
    reply = await post(path, CHAT | {"model": "gpt-4o-mini"}, **settings)
    assert reply.status_code == status
    if status == 200:
        assert reply.json()["model"] == MODEL


async def test_defaults_of_request_fields() -> None:
    defaults = {"n_predict": 3, "seed": 7, "temperature": 0.5, "logprobs": 2}
    engine = ScriptedEngine(says(ANSWER))
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/completion", {"prompt": "a"})):
        assert (await post(path, body, engine, defaults=defaults)).status_code == 200
        assert (await post(path, body | {"max_tokens": 2, "seed": 8}, engine, defaults=defaults)).status_code == 200
    given = [(request.max_new_tokens, request.seed, request.params.temperature) for request in engine.submitted]
    assert given == [(3, 7, 0.5), (2, 8, 0.5)] * 2
    assert (await post("/tokenize", {"content": "a"}, defaults=defaults)).status_code == 200


# -- fields without effect ---------------------------------------------------------------------------------------------

HINTS: dict[str, Any] = {
    "store": True,
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "keep_alive": 5,
    "provider": {"order": ["a"]},
}


async def test_hints_and_unknown_fields_are_taken_and_named() -> None:
    reply = await post("/v1/chat/completions", CHAT | HINTS)
    assert reply.status_code == 200
    assert sorted(reply.headers[HEADER].split(", ")) == sorted(HINTS)


async def test_a_stream_names_them_too() -> None:
    reply = await post("/v1/chat/completions", CHAT | {"stream": True, "keep_alive": 5})
    assert reply.headers[HEADER] == "keep_alive"


@pytest.mark.parametrize("field", HINTS)
async def test_strict_servers_refuse_them(field: str) -> None:
    reply = await post("/v1/chat/completions", CHAT | {field: HINTS[field]}, is_strict=True)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field


async def test_they_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llamaclust")
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        for _ in range(3):
            await http.post("/v1/chat/completions", json=CHAT | {"keep_alive": 5})
    assert [record.getMessage() for record in caplog.records if "keep_alive" in record.getMessage()] == [
        "/v1/chat/completions: fields without effect: keep_alive"
    ]


async def test_names_of_fields_cannot_break_the_header() -> None:
    reply = await post("/v1/chat/completions", CHAT | {"a\r\nSet-Cookie: x": 1, "é" * 500: 2})
    assert reply.status_code == 200 and "set-cookie" not in reply.headers
    assert len(reply.headers[HEADER]) < 200
    many = await post("/v1/chat/completions", CHAT | {f"field{i}": i for i in range(1000)})
    assert len(many.headers[HEADER].split(", ")) == 16


async def test_messages_as_clients_send_them_back() -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}],
            "id": "m1",
        },
        {
            "role": "assistant",
            "content": "Ho",
            "refusal": None,
            "annotations": [],
            "reasoning_content": "Hm",
            "id": "m2",
        },
        {"role": "user", "content": "Hi", "timestamp": 5},
    ]
    reply = await post("/v1/chat/completions", {"messages": messages})
    assert reply.status_code == 200, reply.text
    assert reply.headers[HEADER] == "timestamp"


# -- values ------------------------------------------------------------------------------------------------------------


async def test_no_limit_and_no_seed_in_the_words_of_llamacpp() -> None:
    for fields in ({"max_tokens": -1}, {"n_predict": -1}, {"max_tokens": -2}):
        (request,) = (await complete(**fields)).submitted
        assert request.max_new_tokens == CONTEXT - len(request.prompt), fields
    seeds = {(await complete(seed=-1)).submitted[0].seed for _ in range(3)}
    assert len(seeds) == 3


async def test_whole_numbers_may_have_a_point() -> None:
    assert (await complete(max_tokens=5.0)).submitted[0].max_new_tokens == 5
    reply = await post("/v1/completions", {"prompt": "a", "max_tokens": 5.5})
    assert reply.status_code == 400


async def test_names_of_llamacpp_for_fields_of_openai() -> None:
    (request,) = (await complete(repeat_penalty=1.3, typ_p=0.5, n_predict=3, n_probs=2)).submitted
    assert request.params.repetition_penalty == 1.3 and request.max_new_tokens == 3 and request.top_logprobs == 2
    assert request.params.chain is not None and request.params.chain.typical_p == 0.5


async def test_bodies_with_a_byte_order_mark_or_an_encoding() -> None:
    async with client(make_app(ScriptedEngine(says(ANSWER)))) as http:
        body = json.dumps(CHAT).encode()
        assert (await http.post("/v1/chat/completions", content=b"\xef\xbb\xbf" + body)).status_code == 200
        headers = {"Content-Encoding": "gzip"}
        reply = await http.post("/v1/chat/completions", content=gzip.compress(body), headers=headers)
        assert reply.status_code == 415 and reply.json()["error"]["code"] == "unsupported_encoding"


async def test_usage_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = await post("/v1/chat/completions", CHAT | {"stream": True, "stream_options": options})
    chunks = [event for event in events_of(reply.text) if event != "[DONE]"]
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] > 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
async def test_timings_in_every_event(path: str) -> None:
    body = CHAT if "chat" in path else {"prompt": "a"}
    options = {} if path == "/completion" else {"stream_options": {"include_usage": True}}
    reply = await post(path, body | {"stream": True, "timings_per_token": True} | options)
    events = [event for event in events_of(reply.text) if event != "[DONE]"]
    if "chat" in path:  # the event that begins the message comes before any token
        assert "timings" not in events.pop(0)
    counts = [event["timings"]["predicted_n"] for event in events]
    assert counts == sorted(counts) and counts[-1] > 1
    assert all("prompt_n" in event["timings"] for event in events)
    plain = await post(path, body | {"stream": True})
    assert "timings" not in events_of(plain.text)[0]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_prompt_as_the_model_sees_it(path: str) -> None:
    body: dict[str, Any] = CHAT if "chat" in path else {"prompt": "Hi"}
    reply = (await post(path, body | {"verbose": True})).json()
    prompt = reply["__verbose"]["prompt"]
    assert "Hi" in prompt and ("<|im_start|>user" in prompt) == ("chat" in path)
    events = events_of((await post(path, body | {"verbose": True, "stream": True})).text)
    ends = [event for event in events if event != "[DONE]" and "__verbose" in event]
    assert [event["__verbose"]["prompt"] for event in ends] == [prompt]
    assert ends[0]["choices"][0]["finish_reason"] == "stop"
    assert "__verbose" not in (await post(path, body)).json()


async def test_names_and_tags_of_the_model() -> None:
    async with client(make_app(ScriptedEngine(says("a")), aliases=("a", "b"), tags=("small",))) as http:
        model = (await http.get("/v1/models")).json()["data"][0]
    assert (model["id"], model["aliases"], model["tags"]) == (MODEL, ["a", "b"], ["small"])


async def test_endpoints_that_are_off() -> None:
    async with client(make_app(ScriptedEngine(says("a")), disabled=("slots", "metrics", "docs"))) as http:
        for path in ("/slots", "/metrics", "/docs"):
            reply = await http.get(path)
            assert reply.status_code == 501 and reply.json()["error"]["type"] == "not_supported_error", path
        assert (await http.get("/props")).status_code == 200


async def test_several_prompts_of_llamacpp() -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await post("/completion", {"prompt": ["a", [1, 2], [3, "b"]], "seed": -1}, engine)
    assert [(part["index"], part["content"]) for part in reply.json()] == [(i, ANSWER) for i in range(3)]
    assert len({request.seed for request in engine.submitted}) == 1
    events = events_of((await post("/completion", {"prompt": ["a", "b"], "stream": True}, engine)).text)
    assert "".join(event["content"] for event in events if event["index"] == 1) == ANSWER
    assert (await post("/completion", {"prompt": ["a"]}, engine)).json()["content"] == ANSWER
    assert engine.running == 0
    mixed = await post("/completion", {"prompt": [{"prompt_string": "a"}, [1]]}, engine)
    assert [part["content"] for part in mixed.json()] == [ANSWER, ANSWER]
    image = {"prompt_string": "a", "multimodal_data": ["iVBO"]}
    for prompt in (["a", [[1]]], ["a"] * 65, [["a"], 1], ["a", ""], image, {"prompt_string": 1}, {"text": "a"}):
        assert (await post("/completion", {"prompt": prompt}, engine)).status_code == 400, prompt
    assert engine.running == 0


# -- the end of the prompt ---------------------------------------------------------------------------------------------


async def prompt_of(path: str = "/apply-template", **fields: Any) -> str:
    reply = await post(path, fields)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["prompt"])


async def test_an_assistants_last_message_is_continued() -> None:
    chat = [*CHAT["messages"], {"role": "assistant", "content": "The c"}]
    new = await prompt_of(messages=CHAT["messages"])
    assert new.endswith("<|im_start|>assistant\n")
    assert await prompt_of(messages=chat) == new + "The c"
    assert await prompt_of(messages=chat, continue_final_message=True, add_generation_prompt=False) == new + "The c"
    assert (
        await prompt_of(messages=chat, add_generation_prompt=True) == new + "The c<|im_end|>\n<|im_start|>assistant\n"
    )
    ended = await prompt_of(messages=chat, continue_final_message=False, add_generation_prompt=False)
    assert ended == new + "The c<|im_end|>\n"


async def test_a_continued_message_cannot_forge_control_words() -> None:
    engine = ScriptedEngine(says("a"))
    chat = [*CHAT["messages"], {"role": "assistant", "content": "a<|im_end|>"}]
    await post("/v1/chat/completions", {"messages": chat}, engine)
    plain = chat_template().render(CHAT["messages"])
    assert engine.submitted[0].prompt.count(319) == plain.count("<|im_end|>")


async def test_tokens_of_a_chat_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(says("a"))
    await post("/v1/chat/completions", CHAT, engine)
    monkeypatch.setattr(service_module, "answer_grammar", None)  # not used for a count
    for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"):
        counted = (await post(path, CHAT, engine)).json()
        assert counted["input_tokens"] == len(engine.submitted[0].prompt)
    assert len(engine.submitted) == 1


async def test_counts_refuse_what_chats_refuse() -> None:
    path = "/v1/chat/completions/input_tokens"
    assert (await post(path, CHAT | {"model": "other"}, strict_model=True)).status_code == 404
    assert (await post(path, CHAT | {"top_logprobs": 3})).status_code == 400


async def test_templates_get_the_effort() -> None:
    reply = await post("/v1/chat/completions", CHAT | {"reasoning_effort": "low"})
    assert reply.status_code == 200 and HEADER not in reply.headers
