"""Tests of OpenAI's endpoints: forms of replies and streams, the official client, echoes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, NotFoundError

from llamaclust.model.chat.template import ChatTemplate, TemplateLimits
from support.clusters.served import (
    CONTEXT,
    END,
    MODEL,
    ScriptedEngine,
    client,
    events_of,
    ids,
    logprob,
    make_app,
    says,
    serving,
    tokenizer,
)

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ANSWER = "The cat sat."


async def post(path: str, body: Any, engine: ScriptedEngine | None = None) -> httpx.Response:
    async with client(make_app(engine or ScriptedEngine(says(ANSWER)))) as http:
        return await http.post(path, json=body)


async def chat(engine: ScriptedEngine | None = None, **fields: Any) -> Any:
    reply = await post("/v1/chat/completions", CHAT | fields, engine)
    assert reply.status_code == 200, reply.text
    return events_of(reply.text) if fields.get("stream") else reply.json()


async def complete(engine: ScriptedEngine | None = None, **fields: Any) -> Any:
    reply = await post("/v1/completions", {"prompt": "Hello"} | fields, engine)
    assert reply.status_code == 200, reply.text
    return events_of(reply.text) if fields.get("stream") else reply.json()


# -- chat --------------------------------------------------------------------------------------------------------------


async def test_chat() -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await chat(engine, seed=5)
    assert reply["object"] == "chat.completion" and reply["model"] == MODEL and reply["seed"] == 5
    assert reply["id"].startswith("chatcmpl-") and reply["system_fingerprint"].startswith("build-llamaclust-")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == END and choice["logprobs"] is None
    assert "token_ids" not in choice
    prompt, tokens = len(engine.submitted[0].prompt), len(ids(ANSWER)) + 1
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert choice["timings"]["decode_tok_s"] == 50.0
    text = tokenizer().decode(engine.submitted[0].prompt)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert engine.submitted[0].max_new_tokens == CONTEXT - prompt


async def test_chat_stream() -> None:
    *chunks, done = await chat(stream=True, return_token_ids=True, n=2)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index in (0, 1):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": None}
        assert choices[0]["prompt_token_ids"]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == ANSWER
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert [i for choice in choices for i in choice.get("token_ids", [])] == [*ids(ANSWER), END]
    assert all("usage" not in chunk for chunk in chunks)


async def test_chat_stream_usage() -> None:
    *chunks, last, _ = await chat(stream=True, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ids(ANSWER)) + 1
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_a_cache_salt_reaches_the_engine() -> None:
    engine = ScriptedEngine(says(ANSWER))
    await complete(engine, cache_salt="mine")
    assert engine.submitted[0].cache_salt == "mine"
    reply = await post("/v1/completions", {"prompt": "Hello", "cache_salt": "x" * 257})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "cache_salt"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", {"prompt": "Hello"}),
        ("/api/generate", {"model": "tiny", "prompt": "Hello"}),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/messages", {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}),
        ("/v1/responses", {"model": "tiny", "input": "Hello"}),
        ("/v1/responses/compact", {"model": "tiny", "input": "Hello"}),
    ],
)
async def test_a_cache_salt_reaches_the_engine_by_all_paths(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await post(path, body | {"cache_salt": "mine"}, engine)
    assert reply.status_code == 200 and "X-Llamaclust-Ignored" not in reply.headers
    assert [request.cache_salt for request in engine.submitted] == ["mine"]
    assert '"mine"' not in reply.text, "it is a secret"


async def test_stream_usage_in_each_chunk() -> None:
    """Tests `continuous_usage_stats`, which guidellm uses."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = await chat(stream=True, stream_options=options, return_token_ids=True)
    counted = 0
    for chunk in chunks:
        counted += len(chunk["choices"][0].get("token_ids", ()))
        assert counted <= chunk["usage"]["completion_tokens"] <= last["usage"]["completion_tokens"]
        assert chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
    assert chunks[-1]["usage"] == last["usage"] and counted == len(ids(ANSWER)) + 1
    *chunks, _ = await chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in chunks)


async def test_chat_logprobs() -> None:
    reply = await chat(logprobs=True, top_logprobs=2)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [entry["id"] for entry in content] == [*ids(ANSWER), END]
    assert "".join(entry["token"] for entry in content[:-1]) == ANSWER
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
    same = [np.float32(entry["logprob"]) == np.float32(logprob(i)) for i, entry in enumerate(content)]
    assert all(same)
    streamed = await chat(logprobs=True, top_logprobs=2, stream=True)
    parts = [c["choices"][0]["logprobs"] for c in streamed[:-1] if c["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == content


async def test_chat_messages() -> None:
    engine = ScriptedEngine(says("a"))
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "<|im_end|>"},
    ]
    await chat(engine, messages=messages)
    rendered = tokenizer().decode(engine.submitted[0].prompt)
    assert rendered.startswith("<|im_start|>system\nBe\nbrief<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert engine.submitted[0].prompt.count(END) == 5


async def test_sampling_parameters_reach_the_engine() -> None:
    engine = ScriptedEngine(says("a"))
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1}
    given |= {"frequency_penalty": 0.2, "presence_penalty": 0.3}
    fields = given | {"logit_bias": {"7": -5, "3": 2.5}, "seed": -2, "stop_token_ids": [9], "min_tokens": 2}
    await chat(engine, **fields, max_completion_tokens=9, repeat_last_n=20, stop=None, n=1, user="me", tools=None)
    await chat(engine, top_k=-1)
    (asked, default) = engine.submitted
    assert {name: getattr(asked.params, name) for name in given} == given
    assert asked.params.logit_bias == ((3, 2.5), (7, -5.0))
    assert asked.seed == 2**64 - 2 and asked.max_new_tokens == 9 and asked.min_tokens == 2
    assert 9 in asked.stop_token_ids and END in asked.stop_token_ids and asked.penalty_window == 20
    assert default.params.temperature == 1.0 and default.params.top_k == 0 and default.penalty_window == CONTEXT


# -- completions -------------------------------------------------------------------------------------------------------


async def test_completion() -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await complete(engine, stop="sat")
    (choice,) = reply["choices"]
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    assert choice["text"] == "The cat " and choice["stop_reason"] == "sat" and choice["finish_reason"] == "stop"
    assert engine.submitted[0].max_new_tokens == 16
    assert engine.running == 0


async def test_completion_of_many_prompts() -> None:
    engine = ScriptedEngine(lambda generation: ids(f"{len(generation.prompt)}/{generation.choice}"))
    reply = await complete(engine, prompt=["a", [1, 2, 3]], n=2, return_token_ids=True)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == ["1/0", "1/1", "3/0", "3/1"]
    assert reply["choices"][2]["prompt_token_ids"] == [1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 4
    assert len({generation.seed for generation in engine.submitted}) == 1
    streamed = await complete(engine, prompt=["a", [1, 2, 3]], n=2, stream=True)
    texts = ["", "", "", ""]
    for chunk in streamed[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["1/0", "1/1", "3/0", "3/1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hello 🦙 you", ids("Hello 🦙 you")])
async def test_echo_with_logprobs(prompt: Any, stream: bool) -> None:
    reply = await complete(prompt=prompt, echo=True, logprobs=1, max_tokens=4, stream=stream, return_token_ids=True)
    parts = [chunk["choices"][0] for chunk in reply[:-1]] if stream else reply["choices"]
    kept = [part["logprobs"] for part in parts if part["logprobs"]]
    logprobs = {name: [item for part in kept for item in part[name]] for name in kept[0]}
    asked, given = ids("Hello 🦙 you"), ids(ANSWER)[:4]
    assert "".join(part["text"] for part in parts) == "Hello 🦙 you" + tokenizer().decode(given)
    assert len(logprobs["tokens"]) == len(asked) + 4
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    expected = [logprob(i) for i in range(1, len(asked))] + [logprob(i) for i in range(4)]
    assert np.array_equal(np.array(logprobs["token_logprobs"][1:], np.float32), np.array(expected, np.float32))
    assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert logprobs["text_offset"][len(asked)] == len("Hello 🦙 you")
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    assert [i for part in parts for i in part.get("token_ids", ())] == given


async def test_prompt_logprobs_alone() -> None:
    reply = await complete(echo=True, logprobs=0, max_tokens=0)
    (choice,) = reply["choices"]
    assert choice["text"] == "Hello" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids("Hello"))
    assert reply["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_from_a_token_on() -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await complete(engine, echo=True, logprobs=0, max_tokens=1, score_from=3)
    logprobs = reply["choices"][0]["logprobs"]
    count = len(ids("Hello"))
    assert logprobs["token_logprobs"][:3] == [None] * 3
    assert logprobs["token_logprobs"][3:] == [*map(logprob, range(3, count)), logprob(0)]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == count + 1
    assert engine.submitted[0].score_from == 3
    refused = await post("/v1/completions", {"prompt": "a", "score_from": 1, "echo": True})
    assert refused.json()["error"]["param"] == "score_from"


async def test_an_endless_template_does_not_block_other_requests() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with ChatTemplate(source, "", "", TemplateLimits(wall_s=8.0, cpu_seconds=60)) as template:
        app = make_app(ScriptedEngine(says(ANSWER)), chat_template=template)
        async with client(app) as http:
            looping = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
            assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
            assert not looping.done()
            reply = await looping
            assert reply.status_code == 504 and "template" in reply.json()["error"]["message"]


async def test_special_tokens_of_prompts() -> None:
    engine = ScriptedEngine(says("a"))
    await complete(engine, prompt="<|im_end|>")
    await complete(engine, prompt="<|im_end|>", parse_special=False)
    assert END in engine.submitted[0].prompt and END not in engine.submitted[1].prompt


# -- models and the official client ------------------------------------------------------------------------------------


async def test_models() -> None:
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        listed = (await http.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == [MODEL]
        assert (await http.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
        missing = await http.get("/v1/models/a/b")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
        for path in ("/models/load", "/v1/models/unload"):
            refused = await http.post(path, json={"model": MODEL})
            assert refused.status_code == 501 and "list several as `models` in the cluster file" in refused.text
            assert refused.json()["error"]["message"].startswith(f"{path}: ")


@asynccontextmanager
async def official(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serving(make_app(engine, **settings)) as address,
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{address}/v1", api_key="secret-key", http_client=http, max_retries=0) as openai,
    ):
        yield openai


async def test_the_official_client() -> None:
    async with official(ScriptedEngine(says(ANSWER)), api_keys=("secret-key",)) as openai:
        assert [model.id async for model in openai.models.list()] == [MODEL]
        messages: Any = [{"role": "user", "content": "Hi"}]
        reply = await openai.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=1)
        assert reply.choices[0].message.content == ANSWER
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None and logprobs.content[0].logprob == logprob(0)
        stream = await openai.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
        usage = chunks[-1].usage
        assert usage is not None and usage.completion_tokens == len(ids(ANSWER)) + 1
        completion = await openai.completions.create(model=MODEL, prompt="Hi", logprobs=1, max_tokens=50)
        assert completion.choices[0].text == ANSWER
        streamed = await openai.completions.create(model=MODEL, prompt=[1, 2], stream=True, max_tokens=50)
        assert "".join([chunk.choices[0].text async for chunk in streamed]) == ANSWER
        history = [*messages, reply.choices[0].message, *messages]
        assert (await openai.chat.completions.create(model=MODEL, messages=history)).choices
        async with openai.chat.completions.stream(model=MODEL, messages=messages) as helper:
            assert (await helper.get_final_completion()).choices[0].message.content == ANSWER


async def test_the_official_client_understands_errors() -> None:
    async with official(ScriptedEngine(says(ANSWER))) as openai:
        with pytest.raises(NotFoundError, match="gpt-4"):
            await openai.completions.create(model="gpt-4", prompt="a")
        with pytest.raises(BadRequestError, match="temperature") as refused:
            await openai.completions.create(model=MODEL, prompt="a", temperature=-1)
        assert refused.value.param == "temperature"
