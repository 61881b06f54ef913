"""Checks perplexity by llama.cpp's convention, with the same digits in this process, over HTTP and on two workers."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from llamaclust import Client
from llamaclust.cli.main import main
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.loader import Model
from llamaclust.tools.evaluate.perplexity import Accumulator, cut, measure, read_text
from support.clusters.served import ScriptedEngine, make_app, says, serving
from support.models.tiny_model import build_tiny_model
from support.paths import DATA
from support.several_models.api_models import api_model

CONTEXT = 32
WORDS = "the cat sat on a mat and then it went away over hills and far from here while rain fell "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("ppl") / "tiny.gguf", layers=3, hidden=64, heads=4, ffn=96)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ppl") / "text.txt"
    path.write_text(WORDS * 5)
    return path


def test_sums_are_llama_perplexitys() -> None:
    """Checks the mean and its error (variance over the count, divided by count - 1), both carried through exp."""
    chunks = [[-1.5, -0.25, -3.0], [-2.0, -0.125, -7.5]]
    sums = Accumulator()
    for chunk in chunks:
        sums.add(chunk)
    nll = -np.array(chunks).ravel()
    deviation = math.sqrt((np.mean(nll**2) - np.mean(nll) ** 2) / (nll.size - 1))
    assert sums.result.perplexity == pytest.approx(math.exp(nll.mean()))
    assert sums.result.stderr == pytest.approx(deviation * math.exp(nll.mean()))
    assert (sums.result.chunks, sums.result.tokens) == (2, 6)


def test_a_text_without_a_chance_is_named() -> None:
    sums = Accumulator()
    sums.add([-9999.0])
    with pytest.raises(LlamaclustError, match="9999 nats"):
        _ = sums.result


def test_chunks_begin_with_bos_in_place_of_their_first_token(tiny: Path, text: Path) -> None:
    tokenizer, words = Model.open(tiny).tokenizer, read_text(text)
    ids = tokenizer.encode(words)
    chunks = cut(tokenizer, words, CONTEXT, None)
    assert len(chunks) == len(ids) // CONTEXT > 5
    for number, chunk in enumerate(chunks):
        assert chunk == (tokenizer.bos_id, *ids[number * CONTEXT + 1 : (number + 1) * CONTEXT])
    assert cut(tokenizer, words, CONTEXT, 2) == chunks[:2]
    assert len(cut(tokenizer, words, len(ids), None)) == 1
    with pytest.raises(UsageError, match=rf"the text has {len(ids)} tokens"):
        cut(tokenizer, words, len(ids) + 1, None)


def test_the_second_half_of_each_chunk_is_scored_by_what_stands_before_it(tiny: Path, text: Path) -> None:
    with Client.local(tiny, 1, settings=LocalSettings(context_length=CONTEXT)) as client:
        chunks = cut(Model.open(tiny).tokenizer, read_text(text), CONTEXT, 3)
        running: list[int] = []
        result = measure(client, chunks, lambda value: running.append(value.chunks))
        scored = []
        for chunk in chunks:
            logits = client.logits(chunk).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            scored += [logprobs[place, chunk[place + 1]] for place in range(CONTEXT // 2, CONTEXT - 1)]
    assert (result.chunks, result.tokens, running) == (3, 3 * (CONTEXT // 2 - 1), [1, 2, 3])
    assert result.perplexity == pytest.approx(math.exp(-np.mean(scored)), rel=1e-5)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llamaclust", "model", "perplexity", *arguments])
        main()
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


async def test_the_same_digits_here_and_over_http(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(tiny), "-f", str(text), "-c", str(CONTEXT), "--chunks", "4", "--json")
    code, here, err = command(capsys, *arguments)
    assert (code, err) == (0, "")
    assert json.loads(here).keys() == {"perplexity", "stderr", "chunks", "tokens"}
    stage = LocalStage(tiny, 1, "generic", LocalSettings())
    async with stage.serve(), Engine(LocalPipeline(stage), stage.scheduling) as engine:
        settings = TextSettings("tiny", stage.scheduling.context_length)
        service = TextService(engine, stage.model.tokenizer, stage.model.chat_template, settings)
        async with serving(create_app([api_model(service, engine)])) as url:
            over_http = await asyncio.to_thread(command, capsys, *arguments, "--endpoint", url)
    assert over_http == (0, here, "")


async def test_the_same_digits_on_two_workers(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the command in its own process, since gRPC reads its environment only once."""
    arguments = (str(tiny), "-f", str(text), "-c", str(CONTEXT), "--chunks", "3", "--json")
    _, here, _ = command(capsys, *arguments)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaclust", "model", "perplexity", *arguments, "--workers", "2", "--threads", "1"),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert (process.returncode, out.decode()) == (0, here)


async def test_a_server_with_another_vocabulary_is_found_out(
    tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(make_app(ScriptedEngine(says("Hi")))) as url:
        arguments = (str(tiny), "-f", str(text), "-c", str(CONTEXT), "--endpoint", url)
        code, out, err = await asyncio.to_thread(command, capsys, *arguments)
    assert (code, out) == (2, "") and "of the model file differ" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("-f", "/nonexistent"), "/nonexistent: cannot be read"),
        (("-f", "TINY"), "not UTF-8"),
        (("-f", "TEXT", "-c", "4096"), "take a longer text"),
        (("-f", "TEXT", "-c", "2"), "-c"),
        (("-f", "TEXT", "-c", "32", "--chunks", "0"), "--chunks"),
        (("-f", "TEXT", "-c", "32", "--endpoint", "http://a", "--workers", "2"), "--workers, --threads and --kv-type"),
        (("-f", "TEXT", "-c", "32", "--api-key-file", "TEXT"), "--api-key-file is for --endpoint"),
        (("-f", "TEXT", "-c", "32", "--ca-file", "TEXT"), "--ca-file is for --endpoint"),
    ],
)
def test_mistakes_get_one_line(
    more: tuple[str, ...], words: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TINY": str(tiny), "TEXT": str(text)}
    code, out, err = command(capsys, str(tiny), *(places.get(word, word) for word in more))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.model
def test_the_demo_model_predicts_as_llama_cpp_measured(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DATA / "text" / "wiki.test.head.raw"
    code, out, _ = command(capsys, str(demo_model), "-f", str(text), "--chunks", "8", "--json")
    result = json.loads(out)
    assert (code, result["chunks"], result["tokens"]) == (0, 8, 8 * 255)
    assert result["perplexity"] == pytest.approx(24.5958, rel=0.005)
