"""Tests of benchmarks/gpu.py with a mixture: bytes read, experts in RAM, their copies on the GPU, and goals."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.kernels.backend import CacheCounts
from llamaclust.kernels.split_experts import SplitExpertsStage
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.bench.stage import BenchStage
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu
from gpu_support.figures import CopiedSteps, Figures, Round
from gpu_support.stage import Loaded, Task
from gpu_support.work import Amount, Rates, Work

pytestmark = pytest.mark.usefixtures("gpus")

LAYERS, EXPERTS, USED = 3, 16, 2
SMALL = ("--prompt", "5", "--generate", "6", "--sequences", "4", "--threads", "1", "--repeats", "2")
EVERY = DeviceLayers("cuda:0", 0, LAYERS)
RATES = Rates(Amount(1e12, 0.1e12), Amount(100e12, 5e12))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320, "experts": EXPERTS}
    path = tmp_path_factory.mktemp("benchmark") / "mixture.gguf"
    return build_tiny_model(path, layers=LAYERS, quant_type=QuantType.Q8_0, **small)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the stage, but gives each step a known time; steps with copies take half the time."""
    decode, prefill = BenchStage.decode, BenchStage.prefill

    def decode_s(stage: BenchStage, depth: int, count: int, sequences: int | None = None) -> float:
        assert decode(stage, depth, count, sequences) > 0
        return count * (1.0 if sequences == 1 else 3.0) / (2 if stage.has_copies else 1)

    def prefill_s(stage: BenchStage, tokens: int, sequences: int | None = None) -> float:
        assert prefill(stage, tokens, sequences) > 0
        return 1.0

    monkeypatch.setattr(BenchStage, "decode", decode_s)
    monkeypatch.setattr(BenchStage, "prefill", prefill_s)
    monkeypatch.setattr(Loaded, "rates", lambda loaded: RATES)


def bytes_of(path: Path, part: str, layers: int = LAYERS) -> int:
    """Returns the bytes of tensors whose names contain `part`, in the first `layers` layers."""
    with Model.open(path) as model:
        tensors = model.file.tensors.items()
        return sum(t.n_bytes for name, t in tensors if part in name and int(name.split(".")[1]) < layers)


def run(mixture: Path, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark and returns the record's name and the record."""
    gpu.main([str(mixture), "--record", str(folder), *SMALL, *options])
    (path,) = folder.iterdir()
    return path.name, json.loads(path.read_text())


def wanted(record: dict[str, Any]) -> dict[str, tuple[float | None, bool | None]]:
    return {each["what"]: (each["least"], each["met"]) for each in record["wanted"]}


@pytest.mark.parametrize("moved", [(), (0,), (0, 1, 2)])
def test_what_a_step_reads_where(mixture: Path, moved: tuple[int, ...]) -> None:
    """Each row chooses 2 of 16 experts, so n rows read 16 * (1 - (7/8)^n) on average; routers lie with experts."""
    with Model.open(mixture) as opened:
        whole = Work.of(opened, EVERY, 7, 5, 4)
        work = Work.of(opened, replace(EVERY, cpu_moe=moved), 7, 5, 4)
    experts, routers = (bytes_of(mixture, part, len(moved)) for part in ("_exps", "ffn_gate_inp"))
    for rows in (1, 4, 7):
        touched = experts * (1 - (1 - USED / EXPERTS) ** rows)
        assert work.weight_bytes[rows].cpu == pytest.approx(touched + routers, rel=0.01)
        assert work.expert_bytes[rows] == pytest.approx(touched, rel=0.01)
        amount, all_there = work.weight_bytes[rows], whole.weight_bytes[rows]
        assert all_there.cpu == 0 and amount.gpu + amount.cpu == pytest.approx(all_there.gpu)
    macs = work.prefill_macs
    assert macs.gpu + macs.cpu == whole.prefill_macs.gpu and macs.cpu == 7 * len(moved) * 64 * (USED * 3 * 96 + EXPERTS)
    assert work.kv_bytes == whole.kv_bytes and work.kv_bytes.cpu == 0
    assert work.deep_kv_bytes.gpu == pytest.approx(work.kv_bytes.gpu * (7 + 3) / 3), "5 tokens after 7"
    assert work.is_mixture and work.is_mixed == bool(moved)


def test_goals_of_a_mixture_on_the_gpu() -> None:
    """Eight sequences read four times as many bytes as one; reads, not products, bound a prefill of 512 rows."""
    weights = {rows: Amount(n_bytes, 0) for rows, n_bytes in ((1, 1e12), (8, 4e12), (512, 10e12))}
    work = Work(512, 64, 8, Amount(300e12, 0), weights, Amount(0, 0), Amount(0, 0))
    reached = Round(RATES, prefill_s=28.0, step_s=1.2, many_s=6.6, deep_s=5.0)
    found = {one.what: (one.least, one.is_met) for one in Figures(work, [reached]).wanted()}
    assert found == {
        "decode, of the bandwidth": (0.80, True),
        "prefill, of the peak of 8-bit products or the bandwidth": (0.35, True),
        "8 sequences, of the time to read their weights": (pytest.approx(0.60), True),
    }
    missed = Figures(work, [Round(RATES, prefill_s=29.0, step_s=1.3, many_s=6.7, deep_s=5.0)]).wanted()
    assert [one.is_met for one in missed] == [False] * 3
    long = replace(work, prompt=5200, weight_bytes=weights | {520: Amount(10e12, 0)})
    assert long.prefill_s(RATES) == pytest.approx(100), "a stage computes 520 rows at once"
    few = replace(work, sequences=4, weight_bytes=weights | {4: Amount(3e12, 0)})
    assert Figures(few, [reached]).wanted()[-1].least is None


def test_goals_of_experts_in_ram_and_copies() -> None:
    """A step reads VRAM for 1 s and RAM for 8 s; hits of a quarter leave 6 s of RAM, and add 0.2 s of VRAM."""
    weights = {rows: Amount(1e12, 0.8e12) for rows in (1, 8)} | {512: Amount(2e12, 6e12)}
    work = Work(512, 64, 8, Amount(300e12, 10e12), weights, Amount(0, 0), Amount(0, 0), dict.fromkeys((1, 8), 0.8e12))
    steps = {1: CopiedSteps(8.0, hits=10, misses=30), 8: CopiedSteps(13.0, hits=0, misses=0)}
    found = Figures(work, [Round(RATES, prefill_s=70.0, step_s=10.0, many_s=14.0, deep_s=5.0, copied=steps)])
    assert {one.what: (one.least, one.is_met) for one in found.wanted()} == {
        "decode, of the time to read VRAM and RAM": (0.85, True),
        "8 sequences, of the time to read their weights": (pytest.approx(0.6375), True),
        "decode with copies, times without": (1.0, True),
        "8 sequences with copies, times without": (1.0, True),
    }
    assert found.prefill_share.median == pytest.approx((3 + 60) / 70)
    assert found.copies_share(1).median == pytest.approx((1 + 6) / 8) and found.copies_gain(1).median == 1.25
    assert found.copies_share(8).median == pytest.approx(9 / 13)
    assert [one.found for one in found.wanted()[-2:]] == [found.copies_gain(1).median, 14 / 13]
    all_hit = work.copied_step_s(1, 1.0, RATES.read)
    assert all_hit == pytest.approx(1.8), "the GPU reads all of them"
    slow = {count: replace(step, step_s=20.0) for count, step in steps.items()}
    missed = Figures(work, [Round(RATES, prefill_s=70.0, step_s=10.7, many_s=14.2, deep_s=5.0, copied=slow)]).wanted()
    assert [one.is_met for one in missed] == [False] * 4


@pytest.mark.parametrize(
    ("options", "layers", "name"),
    [
        (("--cpu-moe",), [0, 1, 2], "-mixture-3-cpu-moe.json"),
        (("--n-cpu-moe", "2"), [0, 1], "-mixture-2-cpu-moe.json"),
        ((), [], "-mixture.json"),
    ],
)
def test_experts_in_ram(
    mixture: Path, tmp_path: Path, steps: None, options: tuple[str, ...], layers: list[int], name: str
) -> None:
    path, record = run(mixture, tmp_path, *options, "--experts-cache", "0")
    assert path.endswith(name) and record["settings"]["experts_cache_bytes"] == 0
    assert record["placement"]["cpu_moe"] == layers and record["placement"]["gpu_layers"] == LAYERS
    assert (record["placement"]["ram_bytes"] > 0) == ("ram_read_gb_s" in record["rates"]) == bool(layers)
    read = record["decode"]
    best_s = read["vram_bytes"] / RATES.read.gpu + read["ram_bytes"] / RATES.read.cpu
    assert read["best_token_ms"]["median"] == pytest.approx(1e3 * best_s)
    assert read["share"]["median"] == pytest.approx(best_s) and read["token_ms"]["median"] == 1000.0
    experts, routers = (bytes_of(mixture, part, len(layers)) for part in ("_exps", "ffn_gate_inp"))
    assert read["ram_bytes"] == experts * USED // EXPERTS + routers
    decode = "decode, of the time to read VRAM and RAM" if layers else "decode, of the bandwidth"
    assert wanted(record)[decode] == (0.85 if layers else 0.80, False) and "copies" not in record


def test_copies_beside_none(
    mixture: Path, tmp_path: Path, steps: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hits and misses count the measured steps with copies, of one sequence and of four."""
    uses = list[tuple[bool, int]]()
    mixtures = SplitExpertsStage._mixtures

    def noted(stage: SplitExpertsStage, batch: Any) -> Any:
        uses.append((stage.cache is not None, len(batch.tokens)))
        return mixtures(stage, batch)

    monkeypatch.setattr(SplitExpertsStage, "_mixtures", noted)
    path, record = run(mixture, tmp_path, "--cpu-moe", "--experts-cache", "2MiB")
    assert path.endswith("-mixture-3-cpu-moe-2mib-copies.json")
    assert record["placement"]["experts_cache_bytes"] == record["settings"]["experts_cache_bytes"] == 2 << 20
    one, four = record["copies"]["decode"], record["copies"]["sequences"]
    assert one["hits"] + one["misses"] == 2 * 6 * LAYERS * USED and one["hits"] > 0
    assert 2 * 6 * LAYERS * USED <= four["hits"] + four["misses"] <= 2 * 6 * LAYERS * 4 * USED
    assert one["times_without"]["median"] == four["times_without"]["median"] == 2.0
    assert one["tok_s"]["median"] == 2.0 and one["share"]["median"] > 0
    assert wanted(record)["decode with copies, times without"] == (1.0, True)
    assert "4 with copies 2.7 tok/s (" in (err := capsys.readouterr().err) and "2 MiB of VRAM for copies" in err
    decoded = [(is_cached, rows) for is_cached in (False, True) for rows in (1, 4) for _ in range(6)]
    assert uses[-62:] == 2 * [(False, 5), *6 * [(False, 1)], *decoded]


def test_counts_are_of_the_measured_steps(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without copies count nothing, and each round has its own counts."""
    task = Task(mixture, prompt=3, generate=4, sequences=2, cpu_moe=LAYERS, experts_cache_bytes=2 << 20)
    with closing(Loaded(task)) as loaded:
        loaded.warm_up()
        stage = loaded._stage
        before = stage.copies
        assert before.hits + before.misses > 0 and stage.has_copies
        with stage.without_copies():
            assert not stage.has_copies
            stage.decode(0, 4, 2)
            assert stage.copies == CacheCounts()
        assert (stage.copies.hits, stage.copies.misses) == (before.hits, before.misses)
        steps = loaded._copied_steps(1)
        assert steps.hits + steps.misses == 4 * LAYERS * USED and 0 <= steps.hit_share <= 1


def test_options_that_cannot_be_obeyed(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = build_tiny_model(tmp_path / "dense.gguf", layers=1)
    for option in (("--cpu-moe",), ("--n-cpu-moe", "1"), ("--experts-cache", "4MiB")):
        with pytest.raises(UsageError, match=r"dense\.gguf has no experts; leave out --cpu-moe, --n-cpu-moe"):
            gpu.main([str(dense), *SMALL, *option])
    with pytest.raises(UsageError, match="no copies of experts, since none is in RAM, fits into 4 MiB or has a gate"):
        gpu.main([str(mixture), *SMALL, "--n-cpu-moe", "0", "--experts-cache", "4MiB"])
    for options in (("--cpu-moe", "--n-cpu-moe", "1"), ("--experts-cache", "many"), ("--n-cpu-moe", "-1")):
        with pytest.raises(SystemExit):
            gpu.main([str(mixture), *options])
    assert "not allowed with argument" in capsys.readouterr().err
