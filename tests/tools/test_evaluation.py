"""Compares saved logits and chosen endings with llama.cpp's arithmetic, directly and through the command line."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from llamaclust.tools.evaluate.hellaswag import Accuracy, Task, _score, read_tasks
from llamaclust.tools.evaluate.kl_divergence import Divergence, Estimate, compare
from llamaclust.tools.evaluate.logits_file import Float32, LogitsFile, LogitsShape, writing
from support.clusters.served import serving
from support.models.tiny_model import build_tiny_model
from support.several_models.api_models import api_model

CONTEXT, VOCABULARY = 16, 37
WORDS = "the cat sat on a mat and then it went away over hills and far from here while rain fell "
TASKS = """the cat
1
sat on a mat
went away over hills and far
fell
rain rain rain
it went
3
away
over
from here while
and far from here
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("kld") / "tiny.gguf", layers=2, hidden=64, heads=4, ffn=96)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kld") / "other.gguf"
    return build_tiny_model(path, layers=2, hidden=64, heads=4, ffn=96, seed=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kld") / "text.txt"
    path.write_text(WORDS * 6)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kld") / "tasks.txt"
    path.write_text(TASKS)
    return path


def random_logits(rows: int, seed: int, spread: float = 5.0) -> Float32:
    return (np.random.default_rng(seed).standard_normal((rows, VOCABULARY)) * spread).astype(np.float32)


def write(path: Path, chunks: list[tuple[int, ...]], logits: Float32) -> None:
    shape = LogitsShape(CONTEXT, VOCABULARY, len(chunks))
    with writing(path, shape, chunks) as out:
        for start in range(0, len(logits), 3):
            out.add(logits[start : start + 3])


def some_chunks(count: int) -> list[tuple[int, ...]]:
    return [tuple(range(number, number + CONTEXT)) for number in range(count)]


def test_the_file_is_laid_out_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """Checks each row: float32 scale and least logprob, then an even number of 16-bit values, one per token."""
    chunks, logits = some_chunks(2), random_logits(14, 1)
    logits[0, 3] = -1000.0
    logits[1, :] = 2.5
    write(tmp_path / "x", chunks, logits)
    data = (tmp_path / "x").read_bytes()
    assert data[:8] == b"_logits_"
    assert struct.unpack_from("<Iii", data, 8) == (CONTEXT, VOCABULARY, 2)
    assert struct.unpack_from(f"<{2 * CONTEXT}i", data, 20) == (*chunks[0], *chunks[1])
    row_bytes, start = 2 * (4 + VOCABULARY + 1), 20 + 8 * CONTEXT
    assert len(data) == start + 14 * row_bytes
    for row in range(14):
        scale, least = struct.unpack_from("<ff", data, start + row * row_bytes)
        numbers = np.frombuffer(data, "<u2", VOCABULARY, start + row * row_bytes + 8)
        exact = logits[row].astype(np.float64)
        exact -= exact.max() + math.log(np.exp(exact - exact.max()).sum())
        expected = np.maximum(exact, exact.max() - 16)
        assert np.abs(scale * numbers.astype(np.float64) + least - expected).max() < 0.51 * 16 / 65535 + 1e-5


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    chunks, logits = some_chunks(2), random_logits(14, 2, 1.0)
    write(tmp_path / "x", chunks, logits)
    kept = LogitsFile.open(tmp_path / "x")
    assert (kept.shape, kept.chunks) == (LogitsShape(CONTEXT, VOCABULARY, 2), tuple(chunks))
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.abs(kept.logprobs(1, 2, 7) - exact[9:14]).max() < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_is_not_whole_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "x", LogitsShape(16, 4, 1), some_chunks(1)):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    write(tmp_path / "x", some_chunks(2), random_logits(13, 1))
    with pytest.raises(UsageError, match=r"the file is incomplete"):
        LogitsFile.open(tmp_path / "x")
    with pytest.raises(LlamaclustError, match=r"needs \d+ MiB on the disk, but \d+ MiB are free"):
        writing(tmp_path / "y", LogitsShape(1 << 24, 1 << 20, 1 << 20), []).__enter__()


@pytest.mark.parametrize("damage", [b"", b"GGUF" * 10, b"_logits_" + struct.pack("<Iii", 2, 5, 1) + bytes(100)])
def test_other_files_are_refused(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(damage)
    with pytest.raises(UsageError):
        LogitsFile.open(tmp_path / "x")


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [tuple(range(30, 30 + CONTEXT))], random_logits(7, 1))
    with pytest.raises(UsageError, match="outside its vocabulary of 37"):
        LogitsFile.open(tmp_path / "x")


@pytest.mark.parametrize(
    ("step", "least"),
    [(np.nan, -3.0), (0.0, np.nan), (0.0, -np.inf), (0.0, -1e30), (0.0, 1000.0), (1e38, -9.0), (-1.0, 0.0)],
)
def test_what_are_no_logprobs_is_refused(step: float, least: float, tmp_path: Path) -> None:
    write(tmp_path / "x", some_chunks(1), random_logits(7, 1))
    kept = LogitsFile.open(tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    at = kept.shape.head_bytes + kept.shape.row_bytes
    data[at : at + 8] = struct.pack("<ff", step, least)
    (tmp_path / "x").write_bytes(data)
    assert kept.logprobs(0, 0, 1).shape == (1, VOCABULARY)
    with pytest.raises(UsageError, match="chunk 0 has values that are not logprobs"):
        kept.logprobs(0, 0, 3)


def test_a_text_without_a_chance_is_named_when_compared() -> None:
    with pytest.raises(LlamaclustError, match="almost impossible for a model: 1000 nats per token"):
        Estimate(1000.0, 1.0).exp()


def test_the_figures_are_those_of_their_definitions() -> None:
    rows = 50
    logits, base = random_logits(rows, 3).astype(np.float64), random_logits(rows, 4).astype(np.float64)
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, rows).tolist()
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (logits, base))
    scores = compare(logits.astype(np.float32), q.astype(np.float32), tokens)
    weight = np.where(q > -16, np.exp(q), 0)
    assert scores.kld == pytest.approx((weight * (q - p)).sum(axis=1), rel=1e-4, abs=1e-5)
    assert scores.nll == pytest.approx(-p[range(rows), tokens], rel=1e-5)
    assert scores.base_nll == pytest.approx(-q[range(rows), tokens], rel=1e-5)
    assert scores.same_top.tolist() == (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    more = np.exp(p)[range(rows), tokens] - np.exp(q)[range(rows), tokens]
    assert scores.p_difference == pytest.approx(more, rel=1e-4)
    found = Divergence(scores, 1)
    ratio = p[range(rows), tokens] - q[range(rows), tokens]
    assert found.log_ratio.value == pytest.approx(-ratio.mean(), rel=1e-5)
    assert found.log_ratio.stderr == pytest.approx(ratio.std() / math.sqrt(rows - 1), rel=1e-4)
    assert found.correlation == pytest.approx(np.corrcoef(scores.nll, scores.base_nll)[0, 1], rel=1e-6)
    assert found.kld_quantiles["99.0%"] == pytest.approx(np.quantile(scores.kld, 0.99))
    assert found.kld_quantiles["maximum"] == scores.kld.max()
    assert found.p_difference_rms.value == pytest.approx(math.sqrt((scores.p_difference**2).mean()))


def test_errors_of_means() -> None:
    values = np.arange(20.0)
    estimate = Estimate.of(values)
    assert estimate.value == 9.5 and estimate.stderr == pytest.approx(values.std() / math.sqrt(19))
    assert Estimate.of(values[:5]).stderr == 0.0
    assert Estimate.of(np.full(20, 0.1)).stderr == pytest.approx(0.0, abs=1e-8)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llamaclust", "model", "perplexity", *map(str, words)])
        main()
    out, err = capsys.readouterr()
    code = int(str(ended.value.code))
    return code, json.loads(out) if "--json" in words and not code else out, err


def test_a_model_is_no_distance_from_itself_and_some_from_another(
    tiny: Path, other: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ("-f", text, "-c", CONTEXT, "--chunks", 6, "-t", 1, "--json")
    code, plain, _ = run(capsys, tiny, *keep)
    _, kept, _ = run(capsys, tiny, *keep, "--kl-divergence-base", tmp_path / "x")
    assert code == 0 and kept["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert kept.keys() == plain.keys()
    compared = ("--kl-divergence", "--kl-divergence-base", tmp_path / "x", "-t", 1, "--json")
    _, same, _ = run(capsys, tiny, *compared)
    assert (same["chunks"], same["tokens"]) == (6, 6 * 7)
    assert abs(same["kld"][0]) < 1e-5 and same["same_top"][0] == 1.0
    assert same["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert same["base_perplexity"][0] == pytest.approx(plain["perplexity"], rel=1e-3)
    _, far, _ = run(capsys, other, *compared, "--chunks", 3)
    _, elsewhere, _ = run(capsys, other, *keep[:4], "--chunks", 3, "-t", 1, "--json")
    assert (far["chunks"], far["perplexity"]) == (3, pytest.approx(elsewhere["perplexity"], rel=1e-6))
    assert far["kld"][0] > 0.1 and far["same_top"][0] < 0.5
    code, words, _ = run(capsys, other, *compared[:-1])
    assert code == 0 and "Mean KLD" in words and "99.0% KLD" in words and "Same top p" in words


def test_logits_in_parts_are_those_in_one(tiny: Path) -> None:
    with Client.local(tiny, 1, settings=LocalSettings(context_length=600)) as client:
        tokens = [3 + at % 300 for at in range(600)]
        parts: list[Float32] = []
        client.each_logits(tokens, 40, lambda rows: parts.append(rows.copy()))
        assert [len(part) for part in parts] == [256, 256, 48]
        assert (np.concatenate(parts) == client.logits(tokens)[40:]).all()


def test_the_first_of_the_likeliest_wins_whole_and_by_its_mean() -> None:
    value = Accuracy().plus(Task(((0,),), 1, 2), [[-3.0], [-9.0], [-2.0, -2.0], [-2.5, -2.5]])
    assert (value.tasks, value.right, value.right_norm) == (1, 0, 1)
    value = value.plus(Task(((0,),), 1, 0), [[-1.0], [-1.0], [-5.0], [-5.0]])
    assert (value.acc, value.acc_norm) == (0.5, 1.0)
    low, high = Accuracy(100, 0, 40).acc_norm_range
    assert (low, high) == pytest.approx((0.3094, 0.4980), abs=1e-4)


def test_tasks_are_six_lines_each(tiny: Path, tasks: Path) -> None:
    tokenizer = Model.open(tiny).tokenizer
    read = read_tasks(tasks, tokenizer, None)
    assert [task.right for task in read] == [1, 3]
    assert read[0].endings[2] == tuple(tokenizer.encode("the cat fell"))
    for task in read:
        assert len({ending[: task.shared] for ending in task.endings}) == 1
        assert len({ending[: task.shared + 1] for ending in task.endings}) > 1
    assert read_tasks(tasks, tokenizer, 1) == read[:1]


async def test_endings_are_chosen_alike_here_and_over_http(
    tiny: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (tiny, "--hellaswag", tasks, "--json")
    code, here, _ = run(capsys, *words, "-t", 1)
    assert code == 0 and here.keys() == {"acc", "acc_norm", "acc_norm_95", "tasks"} and here["tasks"] == 2
    stage = LocalStage(tiny, 1, "generic", LocalSettings())
    async with stage.serve(), Engine(LocalPipeline(stage), stage.scheduling) as engine:
        service = TextService(engine, stage.model.tokenizer, stage.model.chat_template, TextSettings("tiny", 512))
        async with serving(create_app([api_model(service, engine)])) as url:
            _, there, _ = await asyncio.to_thread(run, capsys, *words, "--endpoint", url)
    assert here == there
    read = read_tasks(tasks, stage.model.tokenizer, None)
    with Client.local(tiny, 1) as client:
        expected = Accuracy()
        for task in read:
            logprobs = []
            for ending in task.endings:
                logits = client.logits(ending).astype(np.float64)
                each = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                logprobs.append([each[at - 1, ending[at]] for at in range(task.shared, len(ending))])
            assert [list(one) for one in _score(client, task)] == [pytest.approx(one, abs=1e-4) for one in logprobs]
            expected = expected.plus(task, logprobs)
    assert here == expected.as_json()


def test_endings_are_chosen_alike_on_two_workers(tiny: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, here, _ = run(capsys, tiny, "--hellaswag", tasks, "--json")
    words = ("model", "perplexity", str(tiny), "--hellaswag", str(tasks), "--json", "--workers", "2", "-t", "1")
    there = subprocess.run([sys.executable, "-m", "llamaclust", *words], check=True, capture_output=True, timeout=120)
    assert json.loads(there.stdout) == here


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "there is no text to evaluate: give -f TEXT"),
        (("--kl-divergence",), "--kl-divergence needs --kl-divergence-base FILE"),
        (("--kl-divergence", "--kl-divergence-base", "TEXT"), "not a file of logits"),
        (("--kl-divergence", "--kl-divergence-base", "LOGITS"), "vocabulary has 37 tokens, but the model's has 320"),
        (("--kl-divergence", "--kl-divergence-base", "x", "-c", "32"), "remove -c"),
        (("-f", "TEXT", "-c", "16", "--kl-divergence-base", "x", "--workers", "2"), "in this process"),
        (("--kl-divergence", "--kl-divergence-base", "LOGITS", "--endpoint", "http://a"), "in this process"),
        (("-f", "TEXT", "--tasks", "2"), "--tasks is for --hellaswag"),
        (("--hellaswag", "TASKS", "-f", "TEXT"), "remove -f"),
        (("--hellaswag", "TEXT"), "expected six lines for each task (context, number, four endings), found 1 lines"),
        (("--hellaswag", "WRONG"), "line 2: expected the number of the right ending, 0 to 3, found 'four'"),
    ],
)
def test_mistakes_get_one_line(
    more: tuple[str, ...], words: str, tiny: Path, text: Path, tasks: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write(tmp_path / "logits", some_chunks(1), random_logits(7, 1))
    (tmp_path / "wrong").write_text(TASKS.replace("\n1\n", "\nfour\n"))
    places = {"TEXT": text, "TASKS": tasks, "LOGITS": tmp_path / "logits", "WRONG": tmp_path / "wrong"}
    code, out, err = run(capsys, tiny, *(places.get(word, word) for word in more))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
