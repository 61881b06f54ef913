"""Tests of llama.cpp's endpoints."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.dialects.llamacpp.completions import LlamaCppBody
from llamaclust.cluster.front.replies.handlers import Replies
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
)

ANSWER = "The cat 🦙."


async def post(path: str, body: Any, engine: ScriptedEngine | None = None) -> httpx.Response:
    async with client(make_app(engine or ScriptedEngine(says(ANSWER)))) as http:
        return await http.post(path, json=body)


async def complete(engine: ScriptedEngine | None = None, **fields: Any) -> Any:
    reply = await post("/completion", {"prompt": "Hello"} | fields, engine)
    assert reply.status_code == 200, reply.text
    return events_of(reply.text) if fields.get("stream") else reply.json()


async def test_completion() -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await complete(engine)
    assert reply["content"] == ANSWER and reply["tokens"] == []
    assert (reply["stop"], reply["stop_type"], reply["stopping_word"]) == (True, "eos", "")
    assert reply["tokens_predicted"] == len(ids(ANSWER)) + 1
    assert reply["tokens_evaluated"] == len(ids("Hello")) and reply["tokens_cached"] == 3
    assert reply["model"] == MODEL and reply["truncated"] is False
    assert reply["timings"]["predicted_n"] == reply["tokens_predicted"]
    assert reply["timings"]["predicted_per_second"] == 50.0
    assert reply["generation_settings"]["seed"] == engine.submitted[0].seed
    params = engine.submitted[0].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert engine.submitted[0].penalty_window == 64
    assert engine.running == 0


async def test_completion_ends() -> None:
    reply = await complete(stop=["cat"], return_tokens=True)
    assert (reply["content"], reply["stop_type"], reply["stopping_word"]) == ("The ", "word", "cat")
    assert reply["tokens"] == ids(ANSWER)[: len(reply["tokens"])]
    assert (await complete(n_predict=2))["stop_type"] == "limit"
    engine = ScriptedEngine(says("a"))
    for n_predict in (-1, -2, 0):
        await complete(engine, n_predict=n_predict)
    room = CONTEXT - len(ids("Hello"))
    assert [generation.max_new_tokens for generation in engine.submitted] == [room, room, 0]


async def test_completion_stream() -> None:
    *parts, last = await complete(stream=True, n_probs=2)
    assert "".join(part["content"] for part in parts) == ANSWER
    assert [token for part in parts for token in part["tokens"]] == [*ids(ANSWER), END]
    assert [part["tokens_predicted"] for part in parts] == list(range(1, len(parts) + 1))
    assert all(part["stop"] is False for part in parts)
    shown = [entry for part in parts for entry in part["completion_probabilities"]]
    assert [entry["logprob"] for entry in shown] == [logprob(i) for i in range(len(shown))]
    assert last["stop"] is True and last["stop_type"] == "eos" and last["timings"]["cache_n"] == 3
    assert last["tokens_predicted"] == len(parts)


async def test_prompts_and_settings() -> None:
    engine = ScriptedEngine(says("a"))
    await complete(engine, prompt=[5, "Hello", END, "Hi"], seed=3, repeat_last_n=-1, top_k=-1, ignore_eos=True)
    generation = engine.submitted[0]
    assert generation.prompt == (5, *ids("Hello"), END, *ids("Hi"))
    assert (
        generation.seed == 3
        and generation.penalty_window == CONTEXT
        and generation.params.top_k == 0
        and generation.min_tokens > 0
    )
    await complete(engine, prompt="<|im_end|>", seed=-1, logit_bias=[[7, -2], ["Hi", False]])
    generation = engine.submitted[1]
    assert generation.prompt == (END,)
    assert dict(generation.params.logit_bias) == {7: -2.0} | dict.fromkeys(ids("Hi"), -1e9)
    await complete(engine, logit_bias={"9": 1.5})
    assert engine.submitted[2].params.logit_bias == ((9, 1.5),)
    assert engine.submitted[1].seed != engine.submitted[2].seed


async def test_biases_and_new_lines_are_shown() -> None:
    reply = await complete(ScriptedEngine(says("a\nb")), logit_bias=[[7, -2], [9, False]])
    assert reply["generation_settings"]["logit_bias"] == [{"token": 7, "bias": -2.0}, {"token": 9, "bias": None}]
    assert reply["has_new_line"] is True
    events = await complete(ignore_eos=True, stream=True)
    assert {"token": END, "bias": None} in events[-1]["generation_settings"]["logit_bias"]
    assert events[-1]["has_new_line"] is False


@pytest.mark.parametrize("stream", [False, True])
async def test_settings_are_shown_once_for_all_prompts(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dump, dumps = LlamaCppBody.model_dump, 0

    def counted(self: LlamaCppBody, **given: Any) -> Any:
        nonlocal dumps
        dumps += 1
        return dump(self, **given)

    monkeypatch.setattr(LlamaCppBody, "model_dump", counted)
    shown = await complete(prompt=["Hello", "Hi", [5]], seed=3, logit_bias=[[7, -2]], stream=stream)
    settings = [one["generation_settings"] for one in shown if one["stop"]]
    assert len(settings) == 3 and settings[0]["seed"] == 3 and settings == settings[:1] * 3
    assert dumps == 1


async def test_neutral_settings_are_taken() -> None:
    await complete(
        cache_prompt=True,
        id_slot=-1,
        mirostat=0,
        mirostat_tau=5.0,
        dry_multiplier=0.0,
        dry_base=1.75,
        xtc_probability=0,
        typical_p=1,
        grammar="",
        n_keep=0,
        samplers=["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
        lora=[],
        t_max_predict_ms=0,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mirostat": 3}, "mirostat"),
        ({"mirostat_tau": -1}, "mirostat_tau"),
        ({"mirostat_eta": 1e300}, "mirostat_eta"),
        ({"dry_multiplier": -0.8}, "dry_multiplier"),
        ({"dry_base": 0.5}, "dry_base"),
        ({"dry_allowed_length": 0}, "dry_allowed_length"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ({"dry_sequence_breakers": "x"}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": ["x"] * 65}, "dry_sequence_breakers"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"xtc_threshold": -0.5}, "xtc_threshold"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"typ_p": 0.5, "typical_p": 0.6}, "typ_p"),
        ({"tfs_z": "1"}, "tfs_z"),
        ({"top_n_sigma": 1e9}, "top_n_sigma"),
        ({"dynatemp_range": -0.5}, "dynatemp_range"),
        ({"dynatemp_exponent": -1}, "dynatemp_exponent"),
        ({"penalize_nl": 1}, "penalize_nl"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"json_schema": 3}, "json_schema"),
        ({"samplers": ["temperature", "odd"]}, "samplers"),
        ({"samplers": ["top_k", "top-k"]}, "samplers"),
        ({"samplers": "kz"}, "samplers"),
        ({"samplers": [1]}, "samplers"),
        ({"lora": [{"id": 9, "scale": 1}]}, "lora"),
        ({"image_data": [{"data": ""}]}, "image_data"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, 2**70]}, "prompt"),
        ({"n_predict": -3}, "n_predict"),
        ({"n_probs": 5000}, "n_probs"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_last_n": -5}, "repeat_last_n"),
        ({"temperature": -1}, "temperature"),
        ({"logit_bias": [[1, "a"]]}, "logit_bias"),
        ({"logit_bias": [[1, True]]}, "logit_bias"),
        ({"logit_bias": [[None, 1]]}, "logit_bias"),
        ({"logit_bias": [[400, 1]]}, "logit_bias"),
        ({"n_predict": 5, "max_tokens": 6}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"min_tokens": 50}, "min_tokens"),
        ({"stop_token_ids": [5]}, "stop_token_ids"),
        ({"echo": True}, "echo"),
    ],
)
async def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine(says("a"))
    reply = await post("/completion", {"prompt": "a"} | fields, engine)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert engine.submitted == []


async def test_tokenize_and_detokenize() -> None:
    text = "Hi 🦙<|im_end|>"
    tokens = (await post("/tokenize", {"content": text})).json()["tokens"]
    assert tokens == [*ids("Hi 🦙"), END]
    plain = (await post("/tokenize", {"content": text, "parse_special": False})).json()["tokens"]
    assert END not in plain
    pieces = (await post("/tokenize", {"content": text, "with_pieces": True})).json()["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    shown = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(shown).decode() == text
    assert (await post("/detokenize", {"tokens": tokens})).json() == {"content": text}
    assert (await post("/detokenize", {"tokens": []})).json() == {"content": ""}
    for bad in ([320], [-1], ["a"], [1.0]):
        assert (await post("/detokenize", {"tokens": bad})).status_code == 400


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {"content": "é" * (1 << 19) + "a"}, "content"),
        ("/tokenize", {"content": "\U0001f999" * (1 << 16), "with_pieces": True}, "with_pieces"),
        ("/completion", {"prompt": [1, *[""] * 300_000]}, "prompt"),
        ("/completion", {"prompt": "a", "logit_bias": [["", 1]] * 300_000}, "logit_bias"),
        ("/completion", {"prompt": "a", "logit_bias": [["a" * 200_000, 1]]}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(300_000)), 1)}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [*range(300_000)]}, "stop_token_ids"),
    ],
)
async def test_too_much_of_anything_is_refused_at_once(path: str, fields: dict[str, Any], param: str) -> None:
    """Checks that the event loop, which all other requests need, keeps taking turns.

    Measures the process's CPU time between turns, which includes blocking work in all threads but not the machine's
    load.
    """
    call = asyncio.create_task(post(path, fields))
    longest = 0.0
    while not call.done():
        start = time.process_time()
        await asyncio.sleep(0.001)
        longest = max(longest, time.process_time() - start)
    reply = await call
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param)
    assert longest < 3.0, longest  # far below the heartbeat timeout


async def test_apply_template() -> None:
    messages = [{"role": "user", "content": "Hi<|im_end|>"}]
    reply = await post("/apply-template", {"messages": messages})
    assert reply.json()["prompt"] == "<|im_start|>user\nHi<|im_end|><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("path", ["/infill", "/rerank", "/reranking", "/slots/0"])
async def test_what_is_not_supported_is_refused_by_name(path: str) -> None:
    reply = await post(path, {"input": "a"})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (501, "not_supported_error", "not_supported")
    assert error["message"].startswith(f"{path}: ")


async def test_there_are_no_adapters() -> None:
    async with client(make_app(ScriptedEngine(says(ANSWER)))) as http:
        assert (await http.get("/lora-adapters")).json() == []


async def test_endpoints_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    register, registered = Replies.endpoint, list[str]()

    def noted(self: Replies, path: str, *given: Any) -> Any:
        registered.append(path)
        return register(self, path, *given)

    monkeypatch.setattr(Replies, "endpoint", noted)
    async with client(make_app(ScriptedEngine(says(ANSWER)))) as http:
        begun = [*registered]
        for path in ("/completion", "/completions"):
            assert (await http.post(path, json={"prompt": "Hello"})).json()["content"] == ANSWER
    assert begun and registered == begun
