"""Tests of `/infill` and Ollama's `suffix`: order of tokens, room for files, and models without infill tokens."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.core.sampler.params import SamplerName
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.clusters import served
from support.clusters.served import CONTEXT, MODEL, VOCABULARY, ScriptedEngine, client, make_app, says
from support.models.tiny_tokenizers import byte_level

WORDS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"]


def filling(words: list[str]) -> Tokenizer:
    """Returns the tiny tokenizer with `words` as control tokens in place of its last merged tokens."""
    metadata: dict[str, Any] = {**byte_level(VOCABULARY)}
    tokens, merges = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.merges"])
    end = VOCABULARY - 3
    tokens[end - len(words) : end] = words
    kinds = np.array(metadata["tokenizer.ggml.token_type"])
    kinds[end - len(words) : end] = 3
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges[: len(merges) - len(words)],
        "tokenizer.ggml.token_type": kinds,
    }
    return load_tokenizer(metadata)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    made = filling(WORDS)
    monkeypatch.setattr(served, "tokenizer", lambda: made)
    return made


async def post(path: str, body: dict[str, Any], engine: ScriptedEngine, **settings: Any) -> httpx.Response:
    async with client(make_app(engine, **settings)) as http:
        return await http.post(path, json=body)


async def prompt_of(tokenizer: Tokenizer, **fields: Any) -> str:
    """Returns the text of the engine's prompt."""
    engine = ScriptedEngine(says("x"))
    body = {"input_prefix": "def ", "input_suffix": "end", "n_predict": 8} | fields
    reply = await post("/infill", body, engine)
    assert reply.status_code == 200, reply.text
    assert "input_prefix" not in reply.json()["generation_settings"]
    return tokenizer.decode(engine.submitted[0].prompt)


async def test_the_order_is_that_of_llama_cpp(tokenizer: Tokenizer) -> None:
    head = "<|repo_name|>myproject\n"
    rest = "<|file_sep|>filename\n<|fim_prefix|>def f<|fim_suffix|>end<|fim_middle|>"
    assert await prompt_of(tokenizer, prompt="f") == head + rest
    files = [{"filename": "a.py", "text": "A"}, {"text": "B"}]
    shown = "<|file_sep|>a.py\nA<|file_sep|>tmp\nB"
    assert await prompt_of(tokenizer, prompt="f", input_extra=files) == head + shown + rest


async def test_control_words_of_the_texts_stay_text(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(says("x"))
    body = {"input_prefix": "<|fim_middle|>", "input_suffix": "", "n_predict": 1}
    assert (await post("/infill", body, engine)).status_code == 200
    middle = tokenizer.token_id("<|fim_middle|>")
    assert engine.submitted[0].prompt.count(middle) == 1 and engine.submitted[0].prompt[-1] == middle


async def test_files_without_room_are_left_out_from_the_beginning(tokenizer: Tokenizer) -> None:
    prompt = await prompt_of(tokenizer, input_extra=[{"text": "A" * 5000}, {"text": "B" * 20}])
    assert prompt.endswith("<|fim_middle|>") and "B" * 20 in prompt and "myproject" not in prompt
    assert len(tokenizer.encode(prompt, parse_special=True)) <= CONTEXT - 8


async def test_what_has_no_room_is_not_tokenized(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    characters, encode = 0, Tokenizer.encode

    def counted(made: Tokenizer, text: str, **more: bool) -> list[int]:
        nonlocal characters
        characters += len(text)
        return encode(made, text, **more)

    monkeypatch.setattr(type(tokenizer), "encode", counted)
    files = [{"filename": "a" * 50_000, "text": "A" * 50_000} for _ in range(16)]
    prompt = await prompt_of(tokenizer, input_extra=files)
    assert prompt.startswith("AAA") and characters < 2 * CONTEXT * tokenizer.longest_word


async def test_a_prefix_that_is_too_long_is_refused(tokenizer: Tokenizer) -> None:
    for length in (CONTEXT, 100 * CONTEXT):
        body = {"input_prefix": "#" * length, "input_suffix": ""}
        reply = await post("/infill", body, ScriptedEngine(says("x")))
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "exceed_context_size_error")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": 5}, "input_suffix"),
        ({"prompt": [1]}, "prompt"),
        ({"input_extra": "a"}, "input_extra"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra"),
        ({"input_extra": [{"text": "a", "filename": 5}]}, "input_extra"),
    ],
)
async def test_fields_that_are_wrong(tokenizer: Tokenizer, fields: dict[str, Any], name: str) -> None:
    body = {"input_prefix": "a", "input_suffix": "b"} | fields
    reply = await post("/infill", body, ScriptedEngine(says("x")))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)


async def test_suffix_of_ollama(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(says("x"))
    body = {"model": MODEL, "prompt": "def ", "suffix": "end", "stream": False}
    assert (await post("/api/generate", body, engine)).json()["response"] == "x"
    assert tokenizer.decode(engine.submitted[0].prompt) == "<|fim_prefix|>def <|fim_suffix|>end<|fim_middle|>"
    refused = await post("/api/generate", body | {"raw": True}, engine)
    assert refused.status_code == 400 and "suffix" in refused.json()["error"]
    shown = await post("/api/show", {"model": MODEL}, engine)
    assert "insert" in shown.json()["capabilities"]


@pytest.mark.parametrize("samplers", [["top_k", "top_p", "infill"], "kpi"])
async def test_fields_of_editors_are_ignored_by_name(tokenizer: Tokenizer, samplers: Any) -> None:
    """Sends the fields of llama.vscode and llama.vim."""
    limits = {"t_max_prompt_ms": 500, "t_max_predict_ms": 2500, "n_indent": 4, "response_fields": ["content"]}
    body = {"input_prefix": "a", "input_suffix": "b", "samplers": samplers} | limits
    engine = ScriptedEngine(says("x"))
    reply = await post("/infill", body, engine)
    assert reply.status_code == 200, reply.text
    assert set(reply.headers[HEADER].split(", ")) == {*limits, "samplers.infill"}
    chain = engine.submitted[0].params.chain
    assert chain is not None and chain.order == (SamplerName.TOP_K, SamplerName.TOP_P)
    refused = await post("/infill", body, engine, is_strict=True)
    assert refused.status_code == 400 and refused.json()["error"]["param"] in body


@pytest.mark.parametrize("missing", WORDS[:3])
async def test_a_model_without_the_tokens_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filling([word for word in WORDS if word != missing])
    monkeypatch.setattr(served, "tokenizer", lambda: made)
    reply = await post("/infill", {"input_prefix": "a", "input_suffix": "b"}, ScriptedEngine(says("x")))
    assert (reply.status_code, reply.json()["error"]["code"]) == (501, "not_supported")


@pytest.mark.parametrize("path", ["/v1/completions", "/completions"])
@pytest.mark.parametrize("prompts", ["def ", ["def ", "class "]])
async def test_suffix_of_openai(tokenizer: Tokenizer, path: str, prompts: str | list[str]) -> None:
    engine = ScriptedEngine(says("x"))
    reply = await post(path, {"model": MODEL, "prompt": prompts, "suffix": "end"}, engine)
    assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == "x"
    given = [prompts] if isinstance(prompts, str) else prompts
    marked = [f"<|fim_prefix|>{each}<|fim_suffix|>end<|fim_middle|>" for each in given]
    assert [tokenizer.decode(each.prompt) for each in engine.submitted] == marked


@pytest.mark.parametrize("suffix", ["", None])
async def test_an_empty_suffix_is_none(tokenizer: Tokenizer, suffix: str | None) -> None:
    engine = ScriptedEngine(says("x"))
    assert (await post("/v1/completions", {"prompt": "def ", "suffix": suffix}, engine)).status_code == 200
    assert tokenizer.decode(engine.submitted[0].prompt) == "def "


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"prompt": [1, 2]}, "not token ids"), ({"echo": True}, "echo"), ({"prompt": ["a", [3]]}, "not token ids")],
)
async def test_a_suffix_that_cannot_be_used_is_refused(
    tokenizer: Tokenizer, fields: dict[str, Any], reason: str
) -> None:
    reply = await post("/v1/completions", {"prompt": "a", "suffix": "b"} | fields, ScriptedEngine(says("x")))
    assert reply.status_code == 400 and reason in reply.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {}), ("/api/generate", {"model": MODEL})])
async def test_a_model_that_fills_no_gaps_says_so(path: str, body: dict[str, Any]) -> None:
    reply = await post(path, {"prompt": "a", "suffix": "b"} | body, ScriptedEngine(says("x")))
    assert reply.status_code == 400 and "does not support insert" in reply.text
