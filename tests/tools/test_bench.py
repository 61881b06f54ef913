"""Tests of `bench`: what it counts and prints, in this process and on workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from llamaclust.cli.main import main
from llamaclust.cluster.state.measurements import LoadMeter, OtherLoad
from llamaclust.kernels import probes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.costs import LayerCost, ModelCosts
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.bench.bench import BenchTask, Work, run_bench
from llamaclust.tools.bench.even_split import even_split
from llamaclust.tools.bench.limits import Pair, Spread, paired
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.worker.devices.cores import physical_cores
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny_architectures import build_architecture
from support.models.tiny_encoders import RANK, build_encoder
from support.models.tiny_model import build_tiny_model

HIDDEN, FFN, LAYERS, VOCABULARY, KV_WIDTH = 256, 512, 3, 320, 64
MATRICES = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * FFN)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the probes, which have their own tests and allocate half a gigabyte."""
    monkeypatch.setattr(probes, "ReadProbe", FakeProbe)


class FakeProbe:
    """A probe that measures 10 GB/s, then 20, then 30, ..."""

    def __init__(self, threads: int) -> None:
        self._gb_s = 0.0

    def measure(self, seconds: float) -> float:
        self._gb_s += 10.0
        return self._gb_s


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    return build_tiny_model(path, layers=LAYERS, quant_type=QuantType.Q8_0, hidden=HIDDEN, ffn=FFN)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llamaclust", "bench", *arguments])
        main()
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_work_counts_what_is_read_and_multiplied(tiny: Path) -> None:
    task = BenchTask(tiny, 1, prompt=10, generate=9, batch=2, depth=5)
    work = Work.of(Model.open(tiny), task)
    assert work.prefill_macs == 2 * (10 * MATRICES + HIDDEN * VOCABULARY)
    weights = (MATRICES + HIDDEN * VOCABULARY) * 34 / 32  # 34 bytes hold 32 weights of Q8_0
    norms = (2 * LAYERS + 1) * HIDDEN * 4
    keys_and_values = (
        LAYERS * 2 * KV_WIDTH * 2 * 2 * 10
    )  # float16; two sequences, after 5, 6, ... 13 tokens, plus the new one
    assert work.decode_bytes == pytest.approx(weights + norms + keys_and_values)
    assert work.float_share == 0


def test_weights_count_as_the_file_holds_them(tmp_path: Path) -> None:
    """Checks IQ1_S, whose tiles are a quarter larger than in the file, and two used experts of two and of four."""
    path, task = tmp_path / "tiny.gguf", BenchTask(tmp_path, 1, generate=1)
    shape = {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN, "quant_type": QuantType.IQ1_S}
    read = Work.of(Model.open(build_tiny_model(path, **shape)), task).decode_bytes  # type: ignore[arg-type]
    weights = (MATRICES + HIDDEN * VOCABULARY) * 50 / 256  # 50 bytes hold 256 weights
    assert read == pytest.approx(weights + (2 * LAYERS + 1) * HIDDEN * 4 + LAYERS * 2 * KV_WIDTH * 2)
    two, four = (
        Work.of(Model.open(build_tiny_model(path, experts=n, **shape)), task).decode_bytes  # type: ignore[arg-type]
        for n in (2, 4)
    )
    assert four - two == LAYERS * 2 * HIDDEN * 4  # the routers


def test_more_sequences_read_more_experts(tmp_path: Path) -> None:
    """Checks three sequences, each of which uses two of four experts: a quarter of the idle ones stays unread."""
    path, task = tmp_path / "tiny.gguf", BenchTask(tmp_path, 1, generate=1)
    model = Model.open(
        build_tiny_model(path, layers=LAYERS, hidden=HIDDEN, ffn=FFN, experts=4, quant_type=QuantType.Q8_0)
    )
    one, three = (Work.of(model, replace(task, batch=batch)).decode_bytes for batch in (1, 3))
    experts = LAYERS * 2 * (1 - 1 / 4) * 3 * HIDDEN * FFN * 34 / 32
    assert three - one == pytest.approx(experts + 2 * LAYERS * 2 * KV_WIDTH * 2)


def test_keys_and_values_outside_the_window_are_not_read(tmp_path: Path) -> None:
    path, task = tmp_path / "tiny.gguf", BenchTask(tmp_path, 1, depth=5, generate=9)
    whole = Work.of(Model.open(build_tiny_model(path)), task).decode_bytes
    seen = Model.open(build_tiny_model(path, extra={"llama.attention.sliding_window": 8}))
    unseen = (1 + 2 + 3 + 4 + 5 + 6) / 9  # tokens in the window: 6, 7, 8, then 8 of 9, 10, ... 14
    assert whole - Work.of(seen, task).decode_bytes == pytest.approx(
        unseen * sum(layer.kv_bytes_per_token for layer in seen.costs(task.kv_type).layers)
    )


def test_windows_count_in_the_layers_that_have_them(tmp_path: Path) -> None:
    """Checks that every other layer of gemma2 has windows, and that qwen2 has none, whatever the file says."""
    task, path = BenchTask(tmp_path, 1, depth=9, generate=1), tmp_path / "tiny.gguf"
    with Model.open(build_architecture(path, "gemma2")) as model:
        kv = [layer.kv_bytes_per_token for layer in model.costs(task.kv_type).layers]
        weights = Work.of(model, replace(task, depth=0)).decode_bytes - sum(kv)
        assert Work.of(model, task).decode_bytes - weights == 6 * (kv[0] + kv[2]) + 10 * (kv[1] + kv[3])
    sizes = [
        Work.of(Model.open(build_tiny_model(path, architecture="qwen2", extra=extra)), task).decode_bytes
        for extra in ({}, {"qwen2.attention.sliding_window": 4})
    ]
    assert sizes[0] == sizes[1]


def test_float_weights_are_told_apart(tmp_path: Path) -> None:
    task = BenchTask(tmp_path, 1, prompt=10)
    assert Work.of(Model.open(build_tiny_model(tmp_path / "f16.gguf", quant_type=QuantType.F16)), task).float_share == 1
    mixture = Model.open(build_tiny_model(tmp_path / "moe.gguf", experts=4, quant_type=QuantType.Q8_0))
    assert 0 < Work.of(mixture, task).float_share < 0.05  # the routers


def test_shares_are_those_of_pairs() -> None:
    """Checks a machine that reads 40 GB/s and then 80, with a kernel near each limit at its time."""
    pairs = [Pair(38, 40, 40), Pair(39, 40, 41), Pair(38, 40, 80), Pair(76, 79, 80), Pair(77, 80, 80)]
    share = Spread.of(pair.share for pair in pairs)
    assert (share.median, share.least, share.most) == (76 / 79.5, 38 / 60, 39 / 40.5)
    assert f"{share:.0%}" == "96% (63% .. 96%)"


def test_a_limit_is_measured_before_and_after() -> None:
    seen: list[str] = []

    async def run() -> float:
        seen.append("run")
        return 0.5

    async def limit() -> float:
        seen.append("limit")
        return 10.0 * len(seen)

    assert asyncio.run(paired(run, 4e9, limit)) == Pair(8.0, 10.0, 30.0)
    assert seen == ["limit", "run", "limit"]


def test_a_stage_does_the_steps_that_are_timed(tiny: Path) -> None:
    with Model.open(tiny) as model:
        stage = BenchStage(model, StageRunner(CpuBackend(1), model, 0, model.layer_count, stage_limits(3, 100)))
        seen: list[tuple[int, int]] = []
        run = stage._runner.run_to_sample

        def spy(microbatch):  # type: ignore[no-untyped-def]
            seen.append((microbatch.rows, sum(chunk.outputs for chunk in microbatch.chunks)))
            return run(microbatch)

        stage._runner.run_to_sample = spy  # type: ignore[method-assign]
        assert stage.prefill(90) > 0
        assert sum(rows for rows, _ in seen) == 3 * 90
        assert sum(outputs for _, outputs in seen) == 3
        seen.clear()
        assert stage.decode(20, 7) > 0
        assert seen == [(3, 3)] * 7
        stage.close()


def check(report: dict[str, Any], **expected: object) -> None:
    assert {
        "model", "quant_type", "threads", "workers", "feature_level", "prefill", "decode", "machine",
        "decode_roofline", "prefill_roofline",
    } <= report.keys()  # fmt: skip
    prefill, decode, machine = report["prefill"], report["decode"], report["machine"]
    assert isinstance(prefill, dict) and isinstance(decode, dict) and isinstance(machine, dict)
    assert prefill["tok_s"] > 0 and decode["tok_s"] > 0
    assert machine["read_gb_s"] > 0 and machine["int8_gmac_s"] > 0 and machine["fma_gmac_s"] > 0
    for name in ("prefill", "decode"):
        pairs, (least, most) = report["pairs"][name], report[f"{name}_roofline_range"]
        shares = [pair["speed"] / ((pair["before"] + pair["after"]) / 2) for pair in pairs]
        assert (min(shares), median(shares), max(shares)) == (least, report[f"{name}_roofline"], most)
    assert {name: report[name] for name in expected} == expected


def test_json_of_one_process(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-t", "1", "-p", "40", "-n", "5", "-b", "2", "-d", "3", "-r", "2", "--json")
    code, out, err = bench(capsys, str(tiny), *options)
    assert (code, err) == (0, "")
    report = json.loads(out)
    check(report, model="tiny", quant_type="Q8_0", threads=1, workers=1, batch=2, depth=3)
    assert (report["prefill"]["tokens"], report["decode"]["tokens"]) == (40, 5)
    limits = [(pair["before"], pair["after"]) for pair in report["pairs"]["decode"]]
    assert limits == [(10.0, 20.0), (30.0, 40.0)] and report["machine"]["read_gb_s"] == 25.0
    work = Work.of(Model.open(tiny), BenchTask(tiny, 1, 40, 5, 2, 3))
    assert report["decode"]["gb_s"] == pytest.approx(report["decode"]["tok_s"] / 2 * work.decode_bytes / 1e9)
    assert report["prefill"]["gmac_s"] == pytest.approx(report["prefill"]["tok_s"] / 80 * work.prefill_macs / 1e9)


def test_the_feature_level_may_be_forced(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACLUST_FEATURE_LEVEL", "generic")
    code, out, _ = bench(capsys, str(tiny), "-t", "1", "-p", "8", "-n", "2", "-r", "1")
    assert code == 0
    assert all(word in out for word in ("generic", "Q8_0", "tok/s", "GB/s", "GMAC/s", "%"))


def test_workers_are_measured_as_a_cluster(tiny: Path) -> None:
    steps: list[str] = []
    report = run_bench(BenchTask(tiny, 1, prompt=20, generate=4, batch=2, repeats=1, workers=2), steps.append)
    check(report.as_json(), workers=2, threads=1, batch=2)
    assert steps[0] == "starting the workers" and len(steps) == 4


def test_as_many_workers_as_layers_are_used(tiny: Path) -> None:
    """Checks that all workers are used although most add little speed."""
    task = BenchTask(tiny, 1, prompt=1, generate=1, depth=4, repeats=1, workers=LAYERS)
    report = run_bench(task, lambda what: None)
    check(report.as_json(), workers=LAYERS)


def test_a_cut_has_exactly_so_many_stages_and_the_slowest_is_quick() -> None:
    layer = LayerCost(0, 10, 0, used_file_bytes=100)
    costs = ModelCosts(0, 0, 0, (layer,) * 30, head_file_bytes=8 * 121)  # takes as long as eight layers
    for workers in range(1, 31):
        cut = even_split(costs, workers)
        assert len(cut) == workers and cut[0][0] == 0 and cut[-1][1] == 30
        assert all(start < end for start, end in cut)
        assert all(one[1] == other[0] for one, other in pairwise(cut))
    assert even_split(costs, 2) == [(0, 19), (19, 30)]
    assert [end - start for start, end in even_split(costs, 5)][-1] == 1


@pytest.mark.parametrize(("number", "command"), [(signal.SIGTERM, "bench"), (signal.SIGINT, "perplexity")])
def test_an_interrupted_cluster_leaves_nothing(
    tiny: Path, tmp_path: Path, number: signal.Signals, command: str
) -> None:
    """Checks a signal as soon as the command's folder exists, and one during the work."""
    (tmp_path / "text").write_text("the cat sat on a mat " * 20000)
    words = ["bench", str(tiny), "-r", "100"]
    if command == "perplexity":
        words = ["model", "perplexity", str(tiny), "-f", str(tmp_path / "text"), "-c", "16"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    for wait_s in (0.0, 2.5):
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "llamaclust"), *words, "--workers", "2", "-t", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        deadline = time.monotonic() + 60
        while not list(temporary.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(temporary.iterdir()), "the command's folder"
        time.sleep(wait_s)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (128 + number, "", "")
        assert list(temporary.iterdir()) == []


def test_memory_that_is_refused_is_said_in_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(threads: int) -> None:
        raise MemoryError

    monkeypatch.setattr(probes, "ReadProbe", refuse)
    for workers in ("1", "2"):
        code, out, err = bench(capsys, str(tiny), "-t", "1", "-p", "8", "-n", "2", "--workers", workers)
        assert (code, out, err.count("\n")) == (3, "", 1) and "which the system refuses" in err


def test_more_threads_than_cores_are_noted(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = physical_cores() + 1
    code, out, err = bench(capsys, str(tiny), "-t", str(threads), "-p", "8", "-n", "2", "-r", "1")
    assert code == 0 and f"note: {threads} threads shared {physical_cores()} cores" in err
    assert all(line == line.rstrip() for line in out.splitlines())


def test_what_others_take_of_the_processor_is_told(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadMeter, "measure", lambda self: OtherLoad(2, 0.5, 0.1))
    _, _, err = bench(capsys, str(tiny), "-t", "1", "-p", "8", "-n", "2", "-r", "1")
    assert "note: other programs used 0.5 of 2 cores, other virtual machines 0.1 meanwhile" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("TINY", "-p", "2048"), "2049 tokens are requested, but the model's context length is 2048"),
        (("TINY", "-d", "2000", "-n", "100"), "2102 tokens are requested"),
        (("/nonexistent.gguf",), "no such file"),
        (("TINY", "-p", "0"), "--prompt"),
        (("TINY", "--workers", "0"), "--workers"),
        (("TINY", "--workers", "4"), "has 3 layers, too few for 4 workers"),
    ],
)
def test_mistakes_get_one_line(
    arguments: tuple[str, ...], words: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = bench(capsys, *(str(tiny) if word == "TINY" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize(("name", "pooling"), [("bert", 1), ("qwen3", RANK)])
def test_models_that_generate_nothing_get_one_line(
    name: str, pooling: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_encoder(tmp_path / "tiny.gguf", name, pooling=pooling)
    code, out, err = bench(capsys, str(path), "-t", "1", "-p", "8", "-n", "2", "-r", "1")
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{path} is an encoder or reranker" in err


def test_cores_are_shared_out(tiny: Path) -> None:
    task = BenchTask(tiny, None)
    assert replace(task, workers=2).threads_each == max(1, task.threads_each // 2)
    assert replace(task, threads=3, workers=2).threads_each == 3
