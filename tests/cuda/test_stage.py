"""Whole models on the executor for GPUs: the bits of the CPU's, however the work is divided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import numpy as np
import pytest
from batches import Chain, batch_of, load_stage
from shim_device import ShimDevice
from tiny_architectures import build_architecture
from tiny_model import build_tiny_model

from llamaclust.errors import DeviceLostError, DoesNotFitError, LlamaclustError, ModelFileError
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.chain import ChainBackend, Part
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cpu.prepared_files import PreparedFolder
from llamaclust.kernels.cuda import stage as cuda_stage
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.device import Bytes, Device, Graph, Launch
from llamaclust.kernels.cuda.joint_progress import JointProgress
from llamaclust.model.loader import Model
from llamaclust.model.program import KvType
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.control import StageLimits
from llamaclust.wire.messages import Chunk, Microbatch
from llamaclust.worker.batches import build_batch
from llamaclust.worker.stage_runner import planned_workspace_bytes

LIMITS = StageLimits(max_tokens=32, max_outputs=32, max_sequences=4, max_context_tokens=128, kv_blocks=24)
SMALL: dict[str, Any] = {"layers": 3, "heads": 4, "vocabulary": 320}
QUANTIZED: dict[str, dict[str, Any]] = {
    "llama": {
        "quant_type": QuantType.Q4_K,
        "ffn": 256,
        "other_types": {"attn_v": QuantType.Q6_K, "ffn_gate": QuantType.Q8_0, "attn_k": QuantType.F16},
    },
    "moe": {"experts": 4, "quant_type": QuantType.Q8_0, "hidden": 64, "ffn": 96},
}
MODELS = (*QUANTIZED, "llama-experts", "gemma2", "gpt2", "qwen2moe", "qwen3")
ROWS = 20

Open = Callable[[str], Model]


@dataclass(frozen=True, slots=True)
class Free:
    """What was free of a device. A real one's driver takes some as well: there nothing is told apart."""

    device: Device
    n_bytes: int

    @classmethod
    def of(cls, device: Device) -> Free:
        return cls(device, device.free_bytes)

    @property
    def is_exact(self) -> bool:
        return isinstance(self.device, ShimDevice)

    @property
    def taken(self) -> int:
        return self.n_bytes - self.device.free_bytes if self.is_exact else 0


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    folder, models = tmp_path_factory.mktemp("cuda"), dict[str, Model]()

    def open_once(name: str) -> Model:
        path = folder / f"{name}.gguf"
        if name not in models:
            if name in QUANTIZED:
                build_tiny_model(path, **SMALL, **QUANTIZED[name])
            else:
                build_architecture(path, name)
            models[name] = Model.open(path)
        return models[name]

    return open_once


@pytest.fixture(scope="module")
def cpu() -> CpuBackend:
    return CpuBackend(1)


@pytest.fixture
def cuda(device: Device) -> Iterator[CudaBackend]:
    before = Free.of(device)
    yield CudaBackend("cuda:0", device, 1)
    assert before.taken == 0, "memory was not given back"


def random_tokens(model: Model, count: int = ROWS) -> list[int]:
    seed = 7
    return np.random.default_rng(seed).integers(3, model.hyperparameters.vocabulary_size, count).tolist()


def same(found: Float32, wanted: Float32) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    assert np.isfinite(wanted).all() and wanted.std() > 0.1


def run(backend: Backend, model: Model, tokens: Sequence[int], chunk: int, limits: StageLimits = LIMITS) -> Float32:
    chain = Chain(backend, model, limits=limits)
    try:
        return chain.logits(tokens, chunk)
    finally:
        chain.close()


@pytest.mark.parametrize(
    ("name", "kv_type"),
    [*((name, KvType.F16) for name in MODELS), *((name, KvType.Q8_0) for name in ("llama", "moe", "gemma2"))],
)
def test_prompts_and_single_tokens(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str, kv_type: KvType
) -> None:
    model, limits = opened(name), replace(LIMITS, kv_type=kv_type.value)
    tokens = random_tokens(model)
    wanted = run(cpu, model, tokens, ROWS, limits)
    same(run(cuda, model, tokens, ROWS, limits), wanted)
    same(run(cuda, model, tokens[:13], 5, limits), wanted[:13])


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_contexts_of_several_spans(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """What attention gives goes to its product by the kernel that merges spans, where that can be."""
    model, limits = opened(name), replace(LIMITS, max_context_tokens=1024, kv_blocks=64, max_tokens=128)
    stages = [load_stage(backend, model, 1, 2, limits) for backend in (cpu, cuda)]
    hidden = np.random.default_rng(7).standard_normal((515, model.hyperparameters.embedding_length), np.float32)
    for rows in (range(128), range(128, 256), range(256, 384), range(384, 510), range(510, 514), range(514, 515)):
        step = batch_of([([0] * len(rows), rows, range(33))], outputs=[])
        wanted, found = (stage.run(step, hidden[rows.start : rows.stop]).copy() for stage in stages)
        same(found, wanted)
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("name", ["llama", "moe", "gemma2"])
def test_graphs_change_nothing(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, captured, capture = opened(name), list[Graph](), device.capture

    def counted(work: Callable[[], None]) -> Graph:
        captured.append(capture(work))
        return captured[-1]

    monkeypatch.setattr(device, "capture", counted)
    tokens = random_tokens(model, 6)
    wanted = run(cpu, model, tokens, 6)
    same(run(cuda, model, tokens, 1), wanted)
    same(run(cuda, model, tokens, 2), wanted)
    assert len(captured) == 2
    same(run(CudaBackend("cuda:0", device, 1, graphs=False), model, tokens, 1), wanted)
    assert len(captured) == 2


def test_graphs_of_shapes_that_were_used_last_are_kept(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, captures, capture = opened("llama"), list[Graph](), device.capture

    def counted(work: Callable[[], None]) -> Graph:
        captures.append(capture(work))
        return captures[-1]

    monkeypatch.setattr(cuda_stage, "_MOST_SHAPES", 2)
    monkeypatch.setattr(device, "capture", counted)
    tokens, stages = random_tokens(model, 8), [load_stage(backend, model, limits=LIMITS) for backend in (cpu, cuda)]
    for rows in (1, 2, 1, 2, 4, 4, 4, 2, 8, 8, 4, 2, 2, 1, 1):
        step = batch_of([(tokens[:rows], range(rows), [0])])
        wanted, found = (stage.run(step, None).copy() for stage in stages)
        same(found, wanted)
    assert len(captures) == 5, "1, 2, 4 for 1, 8 for 4, since 2 was used between, and 1 again for 8"
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_several_sequences(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """At different places, decoding and prefilling at once, only some rows wanted; then all decode, twice."""
    model = opened(name)
    tokens, tables = random_tokens(model, 24), [[9, 4], [1, 2], [0, 5]]
    stages = [load_stage(backend, model, limits=LIMITS) for backend in (cpu, cuda)]
    steps = [
        batch_of([(tokens[:17], range(17), tables[0]), (tokens[:3], range(3), tables[1])], outputs=[5]),
        batch_of([(tokens[17:19], [17, 18], tables[0]), (tokens[:9], range(9), tables[2])], outputs=[1, 10]),
        batch_of([(tokens[19:20], [19], tables[0]), (tokens[3:4], [3], tables[1]), (tokens[9:10], [9], tables[2])]),
        batch_of([(tokens[20:21], [20], tables[0]), (tokens[4:5], [4], tables[1]), (tokens[10:11], [10], tables[2])]),
        batch_of([(tokens[5:15], range(5, 15), tables[1])], outputs=[]),
        batch_of([(tokens[21:22], [21], tables[0]), (tokens[15:16], [15], tables[1])]),
    ]
    for number, step in enumerate(steps):
        wanted, found = (stage.run(step, None).copy() for stage in stages)
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), f"step {number}")
    for stage in stages:
        stage.close()


@pytest.mark.parametrize(
    "kinds", [kinds for n in (2, 3) for kinds in product("cg", repeat=n) if "g" in kinds], ids="".join
)
def test_chains_of_processors_and_gpus(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, kinds: tuple[str, ...]
) -> None:
    """As one worker's stage, and as stages of several."""
    model = opened("llama-experts")
    tokens = random_tokens(model, 9)
    bounds = [*range(len(kinds)), model.layer_count]
    parts = [Part(cpu if kind == "c" else cuda, *cut) for kind, cut in zip(kinds, pairwise(bounds), strict=True)]
    wanted = run(cpu, model, tokens, 9)
    same(run(ChainBackend(parts), model, tokens, 7), wanted)
    stages = [load_stage(part.backend, model, part.start, part.end, LIMITS) for part in parts]
    hidden: Float32 | None = None
    for stage in stages:
        hidden = stage.run(batch_of([(tokens, range(9), [3])]), hidden)
    assert hidden is not None
    same(hidden, wanted)
    for stage in stages:
        stage.close()


def test_window_blocks_of_their_own(opened: Open, cpu: CpuBackend, cuda: CudaBackend) -> None:
    """Given up behind the window and written over; also in a chain, whose parts need not have such layers."""
    model = opened("gemma2")
    window = model.window
    assert window is not None and window < 40
    limits = replace(LIMITS, max_context_tokens=96, kv_blocks=6, window_blocks=4)
    tokens = random_tokens(model, 90)
    backends = cpu, cuda, ChainBackend([Part(cuda, 0, 1), Part(cpu, 1, 2), Part(cuda, 2, model.layer_count)])
    rows: list[list[Float32]] = []
    for backend in backends:
        stage = load_stage(backend, model, limits=limits)
        rows.append([])
        for at in range(0, 90, 30):
            first, end = max(0, at - window + 1) // 16, -(-(at + 30) // 16)
            ring = tuple(n for block in range(first, end) for n in (block % 4, 1))
            chunk = Chunk(tuple(tokens[at : at + 30]), at, (0, 6), 30, None, ring, first)
            batch = build_batch(
                Microbatch("m", 1, 0, (chunk,)), limits, model.hyperparameters.vocabulary_size, model.window
            )
            rows[-1].append(stage.run(batch, None).copy())
        stage.close()
    for found in rows[1:]:
        same(np.concatenate(found), np.concatenate(rows[0]))


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_was_planned_to_the_byte(opened: Open, cuda: CudaBackend, device: Device, name: str) -> None:
    model, before = opened(name), Free.of(device)
    for start, end in ((0, model.layer_count), (1, 2), (0, 1)):
        program = model.program(start, end)
        tensors = model.tensors_for(program)
        stage = load_stage(cuda, model, start, end, LIMITS)
        weights = sum(tensor.resident_bytes for tensor in tensors.values())
        planned = weights, cuda.kv_bytes(program, LIMITS), cuda.workspace_bytes(program, tensors, LIMITS)
        assert planned == (stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes)
        assert cuda.held_bytes(program, tensors) == weights
        assert before.taken == sum(planned) or not before.is_exact
        stage.close()
        assert cuda.held_bytes(program, tensors) == before.taken == 0


def test_two_epochs_share_weights(opened: Open, cuda: CudaBackend, device: Device) -> None:
    model = opened("llama")
    first, before = load_stage(cuda, model, 0, 2, LIMITS), Free.of(device)
    second = load_stage(cuda, model, 1, 3, LIMITS)
    program = model.program(1, 3)
    shared = sum(t.resident_bytes for t in model.tensors_for(program).values() if t.layer == "blk.1")
    assert before.taken <= second.weight_bytes - shared + second.kv_bytes + second.workspace_bytes
    first.close()
    assert cuda.held_bytes(program, model.tensors_for(program)) == second.weight_bytes
    second.close()


def test_prepared_layers_go_there_as_well(opened: Open, cpu: CpuBackend, device: Device, tmp_path: Path) -> None:
    model = opened("llama")
    tokens = random_tokens(model, 4)
    wanted = run(cpu, model, tokens, 4)
    folder = PreparedFolder(tmp_path / "prepared", 1 << 30)
    for _ in range(2):
        same(run(CudaBackend("cuda:0", device, 1, folder), model, tokens, 4), wanted)
    assert list((tmp_path / "prepared").rglob("*")), "nothing was kept"
    same(run(CpuBackend(1, prepared=folder), model, tokens, 4), wanted)


def test_what_does_not_fit_leaves_nothing_behind(opened: Open, cuda: CudaBackend, device: Device) -> None:
    model, before = opened("llama"), Free.of(device)
    with pytest.raises(DoesNotFitError):
        load_stage(cuda, model, limits=replace(LIMITS, kv_blocks=1 << 26))
    assert before.taken == 0


def test_others_compute_while_kernels_are_compiled_and_an_error_leaves_nothing_behind(
    opened: Open, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = opened("llama"), batch_of([([3], [0], [0])])
    stage = load_stage(cuda, model, 0, 1, LIMITS)
    before = Free.of(device)

    def prepare(kernels: Iterable[str]) -> None:
        serving = Thread(target=stage.run, args=(batch, None), daemon=True)
        serving.start()
        serving.join(10.0)
        assert not serving.is_alive(), "it waits for the compiler"
        raise LlamaclustError("it cannot be compiled")

    with monkeypatch.context() as patched:
        patched.setattr(device, "prepare", prepare)
        with pytest.raises(LlamaclustError, match="it cannot be compiled"):
            load_stage(cuda, model, 1, 2, LIMITS)
    assert before.taken == 0
    stage.close()


def test_progress_tells_of_every_byte(opened: Open, cuda: CudaBackend) -> None:
    model, told = opened("llama"), list[int]()
    program = model.program(0, model.layer_count)
    stage = cuda.load(program, model.tensors_for(program), LIMITS, told.append)
    assert sum(told) == stage.weight_bytes and len(told) > 10
    stage.close()


def test_a_batch_beyond_the_limits_is_refused(opened: Open, cuda: CudaBackend) -> None:
    stage = load_stage(cuda, opened("llama"), limits=LIMITS)
    for table, rows in (([24], 1), ([0, 1, 2], 33)):
        with pytest.raises(ValueError, match="against"):
            stage.run(batch_of([([1] * rows, range(rows), table)], outputs=[0]), None)
    stage.close()


class _BusError(Exception):
    """A driver's."""


def test_a_gpu_that_is_lost_is_told_by_name(
    opened: Open, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage(cuda, opened("llama"), limits=LIMITS)
    batch = batch_of([([3], [0], [0])])
    wanted = stage.run(batch, None).copy()

    def launch(one: Launch) -> None:
        raise _BusError("cudaErrorECCUncorrectable:\n uncorrectable ECC error")

    with monkeypatch.context() as patched:
        patched.setattr(device, "failures", (_BusError,))
        patched.setattr(device, "launch", launch)
        with pytest.raises(
            DeviceLostError, match=r"cuda:0 \(.*\) is lost: cudaErrorECCUncorrectable: uncorrectable ECC"
        ):
            stage.run(batch, None)
    same(stage.run(batch, None), wanted)
    stage.close()


def test_heads_that_are_too_wide_are_told_before_a_start(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=1, hidden=1040, heads=2, kv_heads=2, ffn=64)
    limits = StageLimits(max_tokens=8, max_outputs=8, max_sequences=2, max_context_tokens=64, kv_blocks=5)
    with (
        Model.open(path) as model,
        pytest.raises(ModelFileError, match="cannot be computed: heads of 520"),
    ):
        planned_workspace_bytes(model, 0, 1, limits, 1, "cuda:0")


@pytest.mark.parametrize("at", [1, 3])
def test_a_gpu_that_is_lost_while_memory_is_pinned(
    opened: Open, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """By the first buffer that weights go through, and by the first one of the stage."""
    before, pinned, calls = Free.of(device), device.pinned, list[int]()

    def pin(n_bytes: int) -> Bytes:
        calls.append(n_bytes)
        if len(calls) == at:
            raise _BusError("unspecified launch failure")
        return pinned(n_bytes)

    monkeypatch.setattr(device, "failures", (_BusError,))
    monkeypatch.setattr(device, "pinned", pin)
    with pytest.raises(DeviceLostError, match=r"cuda:0 .* is lost: unspecified launch failure"):
        load_stage(cuda, opened("llama"), limits=LIMITS)
    assert before.taken == 0


@pytest.mark.parametrize("order", ["weights first", "kernels first"])
def test_a_load_that_waits_for_the_compiler_gets_further(order: str) -> None:
    told = list[int]()
    progress = JointProgress(told.append, 1000, 2)
    more, done = partial(progress.add_bytes, 500), progress.module_done
    for step in (more, more, done, done) if order == "weights first" else (done, done, more, more):
        step()
    assert told == ([500, 400, 50, 50] if order == "weights first" else [500, 500])


def test_kernels_are_compiled_while_weights_are_brought(
    opened: Open, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread, and all of them before the first launch."""
    prepared, launched, threads, launch = set[str](), set[str](), set[int](), device.launch

    def prepare(kernels: Iterable[str]) -> None:
        prepared.update(kernels)
        threads.add(get_ident())

    def note(one: Launch) -> None:
        launched.add(one.kernel)
        launch(one)

    monkeypatch.setattr(device, "prepare", prepare)
    monkeypatch.setattr(device, "launch", note)
    with closing(load_stage(CudaBackend("cuda:0", device, 1), opened("llama"), limits=LIMITS)) as stage:
        assert threads and get_ident() not in threads
        stage.run(batch_of([([1] * 9, range(9), range(1))]), None)
    assert launched and launched <= prepared
