"""Checks that a model in this process has the interface and the bits of HTTP clients, and logits."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from llamaclust import Client
from llamaclust.cluster.client.http_codec import CHAT as CHAT_PATH
from llamaclust.cluster.client.http_codec import AnswerOptions
from llamaclust.cluster.client.local import AsyncServiceClient, LocalClient
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import Answer, TextChunk, join
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.core.errors import (
    InsufficientMemoryError,
    LlamaclustError,
    ModelFileError,
    ParameterError,
    RequestError,
    UsageError,
)
from llamaclust.model.pooling import Pooling
from support.clusters.served import serving
from support.models.tiny_model import build_tiny_model
from support.several_models.api_models import api_model

CONTEXT = 640
SEEDED: AnswerOptions = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 11, "ignore_eos": True}
CONSTRAINED: AnswerOptions = {**SEEDED, "structured_outputs": {"choice": ["yes", "no"]}}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("local") / "tiny.gguf", layers=2, hidden=64, heads=4, ffn=96)


@pytest.fixture(scope="module")
def client(tiny: Path) -> Iterator[LocalClient]:
    with Client.local(tiny, threads=1, settings=LocalSettings(context_length=CONTEXT)) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (CHAT_PATH, {"messages": CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens: is 2"),
        (CHAT_PATH, {"messages": CHAT, "tool_choice": "required"}, "tool_choice: expected tools"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of: is 2"),
        ("/v1/embeddings", {"input": ["abc", "d"]}, "pooling: 'none'"),
    ],
)
async def test_contradictory_fields_are_refused_as_over_http(path: str, fields: dict[str, Any], reason: str) -> None:
    service = Mock(settings=Mock(pooling=Pooling.NONE))
    client = AsyncServiceClient(service)
    with pytest.raises(ParameterError, match=reason):
        await (client._embed(fields) if "input" in fields else anext(aiter(client.chunks(path, fields))))
    assert not service.mock_calls


def prompt(seed: int, length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 320, length).tolist()
    return tokens


def test_greedy_tokens_and_logprobs_are_those_of_the_logits(client: LocalClient) -> None:
    ids = prompt(1, 20)
    reply = client.generate(ids, max_tokens=12, ignore_eos=True, score_from=0)
    logits = client.logits([*ids, *reply.token_ids]).astype(np.float64)
    assert logits.shape == (32, 320)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = expected[np.arange(31), [*ids[1:], *reply.token_ids]]
    np.testing.assert_allclose([*reply.prompt_logprobs, *reply.logprobs], chosen, atol=1e-5)
    end_tokens = client._client.service.tokenizer.end_of_generation
    for row, token in zip(logits[19:31], reply.token_ids, strict=True):
        row[list(end_tokens)] = -np.inf
        assert row.argmax() == token
    assert all(np.float32(value) == value for value in reply.logprobs)


def test_logits_of_long_texts_do_not_depend_on_how_they_are_cut(client: LocalClient) -> None:
    ids = prompt(2, CONTEXT)
    whole = client.logits(ids)
    assert whole.shape == (CONTEXT, 320) and np.isfinite(whole).all()
    for length in (1, 37, 256, 257, 513):
        assert np.array_equal(client.logits(ids[:length]), whole[:length]), length


def test_logits_do_not_disturb_answers_that_run(client: LocalClient) -> None:
    alone = client.generate(prompt(3, 30), **SEEDED)
    chunks: list[TextChunk] = []
    for chunk in client.generate(prompt(3, 30), stream=True, **SEEDED):
        client.logits(prompt(len(chunks), 40))
        chunks.append(chunk)
    assert (join(chunks).token_ids, join(chunks).logprobs) == (alone.token_ids, alone.logprobs)


def test_many_threads_get_what_each_gets_alone(client: LocalClient) -> None:
    def generation(seed: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        options: AnswerOptions = {**SEEDED, "seed": seed}
        reply = client.generate(prompt(seed, 10 + 7 * seed), **options)
        return reply.token_ids, reply.logprobs

    alone = [generation(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(generation, range(12))) == alone


@pytest.mark.parametrize(
    "settings",
    [
        LocalSettings(context_length=CONTEXT, prefill_chunk=1),
        LocalSettings(context_length=CONTEXT, prefill_chunk=600, prefix_cache=False),
        LocalSettings(context_length=CONTEXT, max_sequences=1, kv_blocks=20),
    ],
)
def test_settings_change_no_bit(client: LocalClient, tiny: Path, settings: LocalSettings) -> None:
    with LocalClient(tiny, 2, "generic", settings) as other:
        assert other.feature_level == "generic"
        for seed in (4, 5):
            mine, theirs = (model.generate(prompt(seed, 100), score_from=5, **SEEDED) for model in (client, other))
            assert (mine.token_ids, mine.logprobs) == (theirs.token_ids, theirs.logprobs)
            assert mine.prompt_logprobs == theirs.prompt_logprobs


@asynccontextmanager
async def http(tiny: Path) -> AsyncIterator[str]:
    stage = LocalStage(tiny, 1, None, LocalSettings(context_length=CONTEXT))
    width = stage.model.hyperparameters.embedding_length
    text = TextSettings("tiny", CONTEXT, embedding_length=width, context_bounds=stage._context_bounds)
    async with stage.serve(), Engine(LocalPipeline(stage), stage.scheduling) as engine:
        service = TextService(engine, stage.model.tokenizer, stage.model.chat_template, text)
        async with serving(create_app([api_model(service, engine, ApiSettings(is_strict=True))])) as url:
            yield url


def _answers(client: Client | LocalClient) -> list[object]:
    def plain(reply: Answer) -> object:
        return reply.text, reply.token_ids, reply.logprobs, reply.prompt_logprobs, reply.prompt_token_ids, reply.seed

    return [
        plain(client.generate("Once upon a time", score_from=3, **SEEDED)),
        plain(client.generate(prompt(6, 50), **SEEDED)),
        plain(join(client.generate("h\u00e9", stream=True, max_tokens=5, seed=2))),
        plain(client.chat(CHAT, **SEEDED)),
        plain(client.chat(CHAT, **CONSTRAINED)),
        client.tokenize("Once <s> upon"),
        client.tokenize("Once upon", add_special=False),
        client.detokenize([72, 100, 105]),
        [vector.tolist() for vector in client.embed(["Once upon a time", prompt(7, 100)], pooling="mean")],
        [vector.tolist() for vector in client.embed(["Once"], dimensions=5)],
    ]


async def test_http_gives_the_same_bits(client: LocalClient, tiny: Path) -> None:
    async with http(tiny) as url:
        with Client(url) as remote:
            assert await asyncio.to_thread(_answers, remote) == _answers(client)


def _refusals(client: Client | LocalClient) -> list[str]:
    options: list[AnswerOptions] = [
        {"temperature": -1.0},
        {"top_k": -2},
        {"top_p": 2.0},
        {"repetition_penalty": 0.0},
        {"penalty_window": -7},
        {"logit_bias": {5: 1000.0}},
        {"logit_bias": {400: 1.0}},
        {"stop_token_ids": [400]},
        {"min_tokens": 5, "max_tokens": 4},
        {"seed": 1 << 64},
        {"grammar": "root ::= ("},
        {"json_schema": {"type": "nonsense"}},
    ]
    chats: list[list[dict[str, object]]] = [
        [],
        [{**CHAT[0]}, {"role": "function", "content": "x"}],
        [{"role": "unknown", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "name": 5}],
        [{"role": "user", "content": "x", "mood": "good"}],
    ]
    calls: list[Callable[[], object]] = [
        *(partial(client.generate, "x", **chosen) for chosen in options),
        *(partial(client.chat, messages) for messages in chats),
        partial(client.generate, [5] * 700),
        partial(client.generate, []),
        partial(client.generate, "x", score_from=-1),
    ]
    messages = []
    for call in calls:
        with pytest.raises(RequestError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


async def test_http_refuses_in_the_same_words(client: LocalClient, tiny: Path) -> None:
    async with http(tiny) as url:
        with Client(url) as remote:
            assert await asyncio.to_thread(_refusals, remote) == _refusals(client)


def test_a_closed_stream_frees_its_memory(tiny: Path) -> None:
    settings = LocalSettings(context_length=64, max_sequences=1, kv_blocks=4)
    with LocalClient(tiny, 1, settings=settings) as client:
        for _ in range(6):  # each may take all KV blocks
            with client.generate(prompt(7, 20), stream=True, ignore_eos=True) as chunks:
                next(chunks)
                next(chunks)
        dropped = client.generate(prompt(7, 20), stream=True, ignore_eos=True)
        next(dropped)
        del dropped
        gc.collect()
        assert len(client.generate(prompt(7, 20), ignore_eos=True).token_ids) == 44


def test_errors_name_the_field(client: LocalClient) -> None:
    for wrong, words in (
        ([], "0 are given"),
        ([1] * (CONTEXT + 1), f"{CONTEXT + 1} are given"),
        ([320], "vocabulary"),
        ([-1], "vocabulary"),
    ):
        with pytest.raises(RequestError, match=words):
            client.logits(wrong)
    with pytest.raises(RequestError, match="temperature"):
        client.generate("x", temperature=float("nan"))
    with pytest.raises(RequestError, match="context length is 640"):
        client.generate([5] * 700)
    with pytest.raises(RequestError, match=r"messages\[1\]: role"):
        client.chat([CHAT[0], {"role": "function", "content": "x"}])
    with pytest.raises(RequestError, match=r"messages\[0\]: content"):
        client.chat([{"role": "user", "content": 5}])
    with pytest.raises(RequestError, match="2 prompts in one call"):
        client.generate(["a", "b"])  # type: ignore[list-item]  # a list of texts


@pytest.mark.parametrize(
    ("level", "settings", "words"),
    [
        ("mmx", LocalSettings(), "feature level 'mmx'"),
        (None, LocalSettings(context_length=4096), "only 1 to 2048 tokens"),
        (None, LocalSettings(context_length=-1), "context_length is -1"),
        (None, LocalSettings(max_sequences=0), "max_sequences is 0"),
        (None, LocalSettings(max_sequences=1000), "max_sequences is 1000"),
        (None, LocalSettings(prefill_chunk=0), "prefill_chunk is 0"),
        (None, LocalSettings(prefill_chunk=1 << 20), "prefill_chunk"),
        (None, LocalSettings(kv_blocks=-5), "kv_blocks is -5"),
        (None, LocalSettings(kv_blocks=1 << 26), "kv_blocks"),
        (None, LocalSettings(kv_type="q9"), "kv_type q9 is unknown; set one of f16, q8_0"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_be(tiny: Path, level: str | None, settings: LocalSettings, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LocalClient(tiny, 1, level, settings)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ModelFileError, match=r"bad\.gguf"):
        Client.local(tmp_path / "bad.gguf")
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        Client.local(tmp_path / "none.gguf")


def test_a_model_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="run: llamaclust model pull smollm2-135m-instruct"):
        Client.local("smollm2-135m-instruct")


def test_a_model_that_memory_cannot_hold(tiny: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match="MiB are missing"):
        LocalClient(tiny, 1, settings=LocalSettings(kv_blocks=1 << 25))


def test_a_closed_client_raises_and_leaves_no_thread(tiny: Path) -> None:
    before = set(threading.enumerate())
    client = Client.local(tiny, 1)
    client.generate([5], max_tokens=1)
    left = client.generate([5], stream=True)
    next(left)
    client.close()
    client.close()
    left.close()
    assert set(threading.enumerate()) <= before
    for use in (lambda: client.generate([5]), lambda: client.logits([5]), lambda: client.tokenize("x")):
        with pytest.raises(LlamaclustError, match="closed"):
            use()


def test_a_stream_may_be_collected_on_the_services_own_thread(tiny: Path) -> None:
    with Client.local(tiny, 1) as client:
        streams = [client.generate(prompt(8, 10), stream=True, ignore_eos=True)]
        next(streams[0])

        async def drop() -> None:
            streams.clear()

        client._thread.call(drop)
        assert client.generate([5], max_tokens=1).token_ids


def test_a_client_may_be_collected_on_its_services_own_thread(tiny: Path) -> None:
    client = Client.local(tiny, 1)
    thread = client._thread

    async def close() -> None:
        client.close()

    with suppress(LlamaclustError):  # the call ends with the service
        thread.call(close)
    thread._thread.join(60)
    assert not thread._thread.is_alive()


def test_closing_ends_what_runs(tiny: Path) -> None:
    client = Client.local(tiny, 1)
    started, failed = threading.Event(), []

    def read() -> None:
        try:
            for _ in client.generate(prompt(9, 10), stream=True, ignore_eos=True):
                started.set()
        except LlamaclustError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    started.wait(10)
    client.close()
    reader.join(60)
    assert not reader.is_alive() and failed
