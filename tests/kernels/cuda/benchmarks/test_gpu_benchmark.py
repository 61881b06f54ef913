"""Tests of benchmarks/gpu.py: shares of known rates, placement of layers, llama-bench's answers, and records."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.executor.stage import LaunchCache
from llamaclust.kernels.cuda.runtime.device import Device
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.bench.bench import BenchTask
from llamaclust.tools.bench.bench import Work as WholeWork
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.worker.devices import system_info
from llamaclust.worker.stage.stage_runner import plan_memory
from support.cuda.fake_cupy import FakeCupy
from support.cuda.shim_device import ShimDevice
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu
from gpu_support import record as gpu_record
from gpu_support import stage as gpu_stage
from gpu_support.figures import Figures, Round
from gpu_support.llama import LlamaCpp
from gpu_support.sources import sources_digest
from gpu_support.stage import Layout, Loaded, Task
from gpu_support.work import Amount, Rates, Work
from runner.llama import Speed

pytestmark = pytest.mark.usefixtures("gpus")

LAYERS = 4
ANSWER = {
    "build_commit": "0c1e570",
    "build_number": 7000,
    "cpu_info": "a processor",
    "gpu_info": "NVIDIA H100 80GB HBM3",
    "backends": "CUDA",
    "n_gpu_layers": 999,
    "flash_attn": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320}
    path = tmp_path_factory.mktemp("benchmark") / "Tiny Model.gguf"
    return build_tiny_model(path, layers=LAYERS, quant_type=QuantType.Q8_0, **small)


def task_of(model: Path, **other: Any) -> Task:
    return Task(model, **{"threads": 1, "prompt": 3, "generate": 2, "sequences": 2, **other})


def on_gpu(cut: int) -> DeviceLayers:
    return DeviceLayers("cuda:0", cut, LAYERS)


def cap_for(model: Path, device: Device, layers: int) -> int:
    """Returns the VRAM cap in bytes for exactly `layers` layers, including the memory that a backend reserves."""
    kept_bytes = 1 << 20 if isinstance(device, ShimDevice) else device.memory_bytes // 256 + (1 << 20)
    if layers == 0:
        return kept_bytes
    gpu, task = CudaBackend("cuda:0", device, 1), task_of(model)
    with Model.open(model) as opened:
        cut = opened.layer_count - layers
        needed = plan_memory(gpu, opened, cut, opened.layer_count, stage_limits(task.sequences, task.context))
    return needed.total_bytes + kept_bytes


def program(folder: Path, answers: Sequence[dict[str, Any]]) -> Path:
    path = folder / "llama-bench"
    path.write_text(f"#!/bin/sh\necho \"$@\" > '{folder}/arguments'\ncat << 'end'\n{json.dumps(answers)}\nend\n")
    path.chmod(0o755)
    return path


def answers(prefills: Sequence[float], decodes: Sequence[float]) -> list[dict[str, Any]]:
    """Returns llama-bench's answers for prefill of 512 tokens and decode of 64, one per `flash_attn` setting."""
    found = [ANSWER | {"n_prompt": 512, "n_gen": 0, "avg_ts": speed} for speed in prefills]
    return found + [ANSWER | {"n_prompt": 0, "n_gen": 64, "avg_ts": speed} for speed in decodes]


WEIGHTS = Amount(2e12, 0.1e12)
KV, DEEP_KV = Amount(0.1e12, 0.05e12), Amount(0.5e12, 0.1e12)
WORK = Work(512, 64, 8, Amount(300e12, 10e12), dict.fromkeys((1, 8, 512), WEIGHTS), KV, DEEP_KV)
RATES = Rates(Amount(1e12, 0.1e12), Amount(100e12, 5e12))


def test_layers_in_ram_are_held_against_the_sum_of_both_memories() -> None:
    """A step reads VRAM for 2.1 s and RAM for 1.5 s; products take 3 s on the GPU and 2 s on the processor."""
    one = Round(RATES, prefill_s=10.0, step_s=4.0, many_s=8.0, deep_s=5.0)
    figures = Figures(WORK, [one, replace(one, step_s=4.5), replace(one, step_s=3.6)])
    assert figures.decode_share.median == pytest.approx(0.9)
    assert (figures.decode_share.least, figures.decode_share.most) == pytest.approx((0.8, 1.0))
    assert figures.prefill_share.median == pytest.approx(0.5)
    assert figures.times_one.median == pytest.approx(8 * 4.0 / 8.0)
    assert figures.many_share.median == pytest.approx((2.8 + 5.0) / 8.0)
    (wanted,) = figures.wanted()
    assert wanted.least == 0.85 and wanted.is_met
    (short,) = Figures(WORK, [replace(one, step_s=4.5)]).wanted()
    assert not short.is_met and str(short).endswith("0.80 (0.85 wanted: short)")
    found = figures.as_json()
    assert found["decode"]["best_token_ms"]["median"] == pytest.approx(3600)
    assert (found["decode"]["vram_bytes"], found["decode"]["ram_bytes"]) == (2.1e12, 0.15e12)
    deep = found["decode_after_prompt"]
    assert (deep["prompt"], deep["tok_s"]["median"]) == (512, 0.2)
    assert deep["best_token_ms"]["median"] == pytest.approx(4500), "2.5 s of VRAM, 2 s of RAM"
    assert found["rates"]["ram_read_gb_s"]["median"] == pytest.approx(100)


def test_layers_on_the_gpu_alone_are_held_against_it_and_llama_cpp() -> None:
    weights = dict.fromkeys((1, 8, 512), Amount(2e12, 0))
    kv = Amount(0.1e12, 0)
    work = Work(512, 64, 8, Amount(300e12, 0), weights, kv, kv)
    one = Round(Rates(Amount(1e12, 0), Amount(100e12, 0)), 5.0, 2.625, 2.5, 2.7, Speed(prefill=204.8, decode=0.2))
    figures = Figures(work, [one])
    found = {wanted.what: (wanted.found, wanted.is_met) for wanted in figures.wanted()}
    expected: dict[str, tuple[object, bool | None]] = {
        "decode, of the bandwidth": (pytest.approx(0.8), True),
        "prefill, of the peak of 8-bit products": (pytest.approx(0.6), True),
        "8 sequences, times one": (pytest.approx(8.4), True),
        "decode, times llama.cpp": (pytest.approx(1 / 0.525), True),
        "prefill, times llama.cpp": (pytest.approx(0.5), None),
    }
    assert found == expected
    slow = Figures(work, [replace(one, prefill_s=10.0, step_s=6.0, many_s=9.0)]).wanted()
    assert [wanted.is_met for wanted in slow] == [False, False, False, False, None]
    assert "ram_read_gb_s" not in figures.as_json()["rates"]


def test_the_greater_rate_of_before_and_after_counts() -> None:
    other = Rates(Amount(0.9e12, 0.2e12), Amount(120e12, 1e12))
    assert RATES.best(other) == other.best(RATES) == Rates(Amount(1e12, 0.2e12), Amount(120e12, 5e12))


def test_work_of_both_devices_is_that_of_the_whole(model: Path) -> None:
    with Model.open(model) as opened:
        whole = WholeWork.of(opened, BenchTask(model, 1, prompt=7, generate=5))
        works = [Work.of(opened, on_gpu(cut), 7, 5, 2) for cut in range(LAYERS)]
    assert (works[0].prefill_macs, works[0].step_bytes(1)) == (
        Amount(whole.prefill_macs, 0),
        Amount(whole.decode_bytes, 0),
    )
    for cut, work in enumerate(works):
        macs, read = work.prefill_macs, work.step_bytes(1)
        assert (macs.gpu + macs.cpu, read.gpu + read.cpu) == (whole.prefill_macs, whole.decode_bytes)
        assert read.cpu == pytest.approx(cut * works[1].step_bytes(1).cpu)
        assert work.step_bytes(2).cpu - read.cpu == work.kv_bytes.cpu


def test_what_does_not_fit_on_the_gpu_lies_in_ram(model: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = task_of(model, gpu_memory_bytes=cap_for(model, device, 2))
    monkeypatch.setattr(gpu_stage, "ReadProbe", lambda threads: SimpleNamespace(measure=lambda seconds: 5.0))
    with closing(Loaded(chosen)) as loaded:
        assert (loaded.layout.gpu.start, loaded.layout.gpu.end) == (2, LAYERS)
        assert str(loaded.layout).startswith("2 of 4 layers on GPUs: [0, 2) cpu, [2, 4) cuda:0; ")
        loaded.warm_up()
        found = loaded.measure()
        assert min(found.prefill_s, found.step_s, found.many_s, found.deep_s) > 0
        assert min(found.rates.read.gpu, found.rates.int8.gpu, found.rates.int8.cpu) > 0
        assert found.rates.read.cpu == 5e9
        step = loaded.work.step_bytes(1)
        best_s = step.gpu / found.rates.read.gpu + step.cpu / 5e9
        assert Figures(loaded.work, [found]).decode_share.median == pytest.approx(best_s / found.step_s)
    with pytest.raises(InsufficientMemoryError, match=r"the last layer and the head on cuda:0 need .* MiB are missing"):
        Loaded(replace(chosen, gpu_memory_bytes=cap_for(model, device, 0)))
    monkeypatch.setattr(system_info, "available_memory_bytes", lambda: 1 << 10)
    with pytest.raises(InsufficientMemoryError, match=r"layers \[0, 2\) on cpu, needs .* MiB are missing"):
        Loaded(chosen)


def test_a_run_beside_llama_cpp_and_its_record(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage runs, but its times and the rates are replaced by values that give known shares."""
    prefill, decode = BenchStage.prefill, BenchStage.decode

    def prefill_s(stage: BenchStage, tokens: int, sequences: int | None = None) -> float:
        assert prefill(stage, tokens, sequences) > 0
        return 0.5

    def decode_s(stage: BenchStage, depth: int, steps: int, sequences: int | None = None) -> float:
        assert decode(stage, depth, steps, sequences) > 0
        return steps * (0.25 if sequences == 1 else 0.3125)

    with Model.open(model) as opened:
        work = Work.of(opened, on_gpu(0), 3, 2, 2)
    rates = Rates(Amount(8 * work.step_bytes(1).gpu, 0), Amount(4 * work.prefill_macs.gpu, 0))
    monkeypatch.setattr(BenchStage, "prefill", prefill_s)
    monkeypatch.setattr(BenchStage, "decode", decode_s)
    monkeypatch.setattr(Loaded, "rates", lambda loaded: rates)
    bench, folder = program(tmp_path, answers([10.0, 12.0], [5.0, 2.0])), tmp_path / "results"
    small = ["--prompt", "3", "--generate", "2", "--sequences", "2", "--threads", "1", "--repeats", "2"]
    gpu.main([str(model), "--llama-bench", str(bench), "--record", str(folder), *small])
    out, err = capsys.readouterr()
    (path,) = folder.iterdir()
    record = json.loads(path.read_text())
    assert record == json.loads(out) and path.name.endswith("-tiny-model.json") and path.name == path.name.lower()
    assert record["decode"]["share"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    assert record["decode"]["tok_s"]["median"] == 4.0 and record["prefill"]["share"]["median"] == 0.5
    assert record["sequences"]["times_one"]["median"] == 1.6 and record["prefill"]["tok_s"]["median"] == 6.0
    assert record["llama_cpp"]["decode_ratio"]["median"] == pytest.approx(0.8)
    assert record["llama_cpp"]["prefill_ratio"]["median"] == pytest.approx(0.5)
    assert record["llama_bench"]["gpu_info"] == ANSWER["gpu_info"] and record["rounds"] == 2
    assert record["placement"]["gpu_layers"] == LAYERS and record["model"]["quant_type"] == "Q8_0"
    assert record["settings"]["graphs"] is True and "." in record["gpu"]["compute_capability"]
    assert {"driver", "cuda", "cupy", "nvrtc", "name", "memory_bytes"} < set(record["gpu"])
    assert record["kernels"]["read_gb_s"] > 0 < record["kernels"]["int8_gmac_s"]
    assert record["date"].endswith("+00:00") and record["command"] and record["llamaclust"]["version"]
    assert record["llamaclust"]["sources"] == sources_digest(ROOT)
    assert "round 2/2: llama.cpp decode 5.0 tok/s" in err and "times llama.cpp: 0.80 (1.00 wanted: short)" in err
    given = (tmp_path / "arguments").read_text().split()
    assert given[given.index("-m") + 1] == str(model.parent / "Tiny") and given[-2:] == ["-r", "2"]
    for pair in (("-ngl", "999"), ("-mg", "0"), ("-sm", "none"), ("-fa", "0,1"), ("-p", "3"), ("-n", "2")):
        assert given[given.index(pair[0]) + 1] == pair[1]


def test_figures_are_printed_where_their_record_cannot_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path, record: dict[str, Any]) -> Path:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(
        gpu,
        "Loaded",
        lambda task, whole: SimpleNamespace(
            warm_up=lambda: None, measure=lambda: Round(RATES, 10.0, 4.0, 8.0, 5.0), work=WORK, close=lambda: None
        ),
    )
    monkeypatch.setattr(gpu, "described", lambda loaded, command: {})
    monkeypatch.setattr(gpu_record, "write_record", full)
    with pytest.raises(OSError, match="the disk is full"):
        gpu.main([str(model), "--record", str(tmp_path), "--repeats", "2"])
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == 2 and err.count("not written: ") == 2


def test_folders_of_records_are_checked_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "Loaded", None)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    wrong = {"file": "not a folder", "file/inner": "not a folder", "link": "a link to nothing"}
    for name, words in wrong.items():
        with pytest.raises(UsageError, match=f"{name}: {words}"):
            gpu.main([str(model), "--record", str(tmp_path / name)])
    with pytest.raises(UsageError, match=r"^/proc/records: cannot be written to: "):
        gpu.main([str(model), "--record", "/proc/records"])


def test_a_record_names_the_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.159.04\necho 580.159.04\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    monkeypatch.setattr(gpu_record, "open_nvrtc", lambda: SimpleNamespace(version=(13, 0)))
    found = gpu_record.software()
    assert found.pop("python") == platform.python_version()
    assert found == {"driver": "580.159.04", "cuda": "13.0", "cupy": "14.2.0", "nvrtc": "13.0"}


def test_no_graphs_is_obeyed(model: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = list[bool]()

    def compute(launches: LaunchCache, shape: Any) -> Any:
        captured.append(launches._captures)
        return segments(launches, shape)

    segments = LaunchCache.segments
    monkeypatch.setattr(LaunchCache, "segments", compute)
    for graphs in (True, False):
        with closing(Loaded(task_of(model, graphs=graphs))) as loaded:
            loaded.warm_up()
        assert captured and set(captured) == {graphs}
        captured.clear()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"backends": "CPU"}, "built for CPU; build it with GGML_CUDA=ON"),
        ({"gpu_info": ""}, "llama-bench finds no GPU"),
        ({"avg_ts": None}, "does not print llama-bench's JSON"),
    ],
)
def test_a_llama_bench_that_will_not_do(model: Path, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    path = program(tmp_path, [one | changed for one in answers([1.0], [2.0])])
    with pytest.raises(UsageError, match=words) as error:
        LlamaCpp(path, 0, 512, 64).measure(model)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_mistakes_are_told_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"nope\.gguf: no such file"):
        gpu.main(["nope.gguf"])
    with pytest.raises(UsageError, match=r"no such file; docs/internals/gpu-kernels\.md says how to build it"):
        gpu.main([str(model), "--llama-bench", str(tmp_path / "llama-bench")])
    with pytest.raises(UsageError, match="10065 tokens are requested, but the model's context length is 2048"):
        gpu.main([str(model), "--prompt", "10000"])
    for option in (("--gpu-memory", "much"), ("--device", "cpu"), ("--device", "cuda:²"), ("--repeats", "0")):
        with pytest.raises(SystemExit):
            gpu.main([str(model), *option])
    err = capsys.readouterr().err
    assert "is not a size" in err and "'cuda:²' is not a GPU; give one GPU, such as cuda:0" in err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match="device cuda needs CuPy: pip install"):
        gpu.main([str(model)])


def test_llama_cpp_is_compared_on_the_gpu_alone(model: Path, device: Device, tmp_path: Path) -> None:
    cap = cap_for(model, device, 1)
    path = program(tmp_path, answers([1.0], [1.0]))
    with pytest.raises(UsageError, match="needs all layers on the GPU, but the layout is 1 of 4 layers"):
        gpu.measured(task_of(model, gpu_memory_bytes=cap), LlamaCpp(path, 0, 3, 2), 1)


def test_a_layout_says_what_it_is() -> None:
    layers = DeviceLayers("cuda:0", 0, 32)
    whole = "32 of 32 layers on GPUs: [0, 32) cuda:0"
    assert str(Layout((layers,), 4 << 30, 0)) == f"{whole}; 4096 MiB of VRAM"
    moved = replace(layers, cpu_moe=(0, 1), experts_cache_bytes=2 << 20)
    memory = "4096 MiB of VRAM, 1024 MiB of RAM, 2 MiB of VRAM for copies of experts"
    assert str(Layout((moved,), 4 << 30, 1 << 30)) == f"{whole}, experts of [0, 2) cpu; {memory}"
