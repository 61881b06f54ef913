"""Checks that whole models on the GPU executor give the CPU executor's bits, however the work is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.executor import stage as cuda_stage
from llamaclust.kernels.cuda.runtime.device import Device, Graph
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.model.kv_type import KvType
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.matmul_cases import check_equal_bits
from support.cuda.stages import LIMITS, MODELS, ROWS, Open, random_tokens, run, same
from support.seed import SEED
from support.wire.frame_reader import build_batch


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


@pytest.mark.parametrize("name", MODELS[SEED % 2 :: 2])
def test_normed_rows(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """Covers batches without logits, and some rows of a microbatch, with the half of the models that the run's seed
    selects."""
    model = opened(name)
    tokens = random_tokens(model)
    stages = [load_stage(backend, model, limits=LIMITS) for backend in (cpu, cuda)]
    every, some = range(ROWS), [0, 1, 5, 7, 8, 9, ROWS - 1]
    for outputs, asked in (([], (every, some)), ([ROWS - 1], (every,))):
        for stage in stages:
            stage.run(batch_of([(tokens, range(ROWS), range(2))], outputs=outputs), None)
        for rows in asked:
            wanted, found = (stage.normed(np.array(rows, np.int32)).copy() for stage in stages)
            same(found, wanted)
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("name", ["llama", "moe", "gpt-oss"])
def test_contexts_of_several_spans(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """The kernel that merges spans quantizes their result for the following product, where possible."""
    model, limits = opened(name), replace(LIMITS, max_context_tokens=1024, kv_blocks=64, max_batch_tokens=128)
    stages = [load_stage(backend, model, 1, 2, limits) for backend in (cpu, cuda)]
    hidden = np.random.default_rng(7).standard_normal((515, model.hyperparameters.embedding_length), np.float32)
    for rows in (range(128), range(128, 256), range(256, 384), range(384, 510), range(510, 514), range(514, 515)):
        step = batch_of([([0] * len(rows), rows, range(33))], outputs=[])
        wanted, found = (stage.run(step, hidden[rows.start : rows.stop]).copy() for stage in stages)
        same(found, wanted)
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("name", ["llama", "moe", "gemma2", "gpt-oss", "gemma4-inputs"])
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


def test_without_memory_for_graphs_kernels_are_launched_one_by_one(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = opened("llama"), list[Callable[[], None]]()

    def fail(work: Callable[[], None]) -> Graph:
        tried.append(work)
        raise InsufficientMemoryError("no memory")

    monkeypatch.setattr(device, "capture", fail)
    tokens = random_tokens(model, 6)
    same(run(cuda, model, tokens, 1), run(cpu, model, tokens, 6))
    assert len(tried) == 1


def test_images_need_no_kernels_that_a_load_did_not_prepare(
    opened: Open, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is compiled in a step delays it so long that the worker counts as hung."""
    model, kernels = opened("gemma2"), set[str]()
    monkeypatch.setattr(device, "prepare", kernels.update)
    stage = load_stage(cuda, model, limits=LIMITS)
    stage.close()
    assert any(kernel.startswith("attention.grouped.") for kernel in kernels)


def test_graphs_of_shapes_that_were_used_last_are_kept(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, captures, capture = opened("llama"), list[Graph](), device.capture

    def counted(work: Callable[[], None]) -> Graph:
        captures.append(capture(work))
        return captures[-1]

    monkeypatch.setattr(cuda_stage, "_MAX_SHAPES", 2)
    monkeypatch.setattr(device, "capture", counted)
    tokens, stages = random_tokens(model, 8), [load_stage(backend, model, limits=LIMITS) for backend in (cpu, cuda)]
    for rows in (1, 2, 1, 2, 4, 4, 4, 2, 8, 8, 4, 2, 2, 1, 1):
        step = batch_of([(tokens[:rows], range(rows), [0])])
        wanted, found = (stage.run(step, None).copy() for stage in stages)
        same(found, wanted)
    assert len(captures) == 5, "1, 2, 4 for 1, 8 for 4, since 2 was used between, and 1 again for 8"
    for stage in stages:
        stage.close()


@pytest.mark.parametrize(
    "name", ["llama", "moe", "gpt-oss-mxfp4", "gemma4-inputs", "mistral3", "lfm2", "qwen35", "granitehybrid"]
)
def test_several_sequences(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """Sequences at different positions decode and prefill together, with some outputs; then all decode, twice."""
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
        check_equal_bits(found, wanted, f"step {number}")
    for stage in stages:
        stage.close()


@pytest.mark.parametrize(
    "kinds", [kinds for n in (2, 3) for kinds in product("cg", repeat=n) if "g" in kinds], ids="".join
)
def test_chains_of_processors_and_gpus(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, kinds: tuple[str, ...]
) -> None:
    """Covers one worker's stage on several devices, and stages of several workers."""
    model = opened("llama-experts")
    tokens = random_tokens(model, 9)
    bounds = [*range(len(kinds)), model.layer_count]
    parts = [
        BackendLayers(cpu if kind == "c" else cuda, *cut) for kind, cut in zip(kinds, pairwise(bounds), strict=True)
    ]
    wanted = run(cpu, model, tokens, 9)
    same(run(MultiDeviceBackend(parts), model, tokens, 7), wanted)
    stages = [load_stage(part.backend, model, part.start, part.end, LIMITS) for part in parts]
    hidden: Float32 | None = None
    for stage in stages:
        hidden = stage.run(batch_of([(tokens, range(9), [3])]), hidden)
    assert hidden is not None
    same(hidden, wanted)
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "gemma4"])
def test_window_blocks_of_their_own(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """Blocks behind the window are released and overwritten, also with several devices that may lack such layers."""
    model = opened(name)
    window = model.window
    assert window is not None and window < 40
    limits = replace(LIMITS, max_context_tokens=96, kv_blocks=6, window_blocks=4)
    tokens = random_tokens(model, 90)
    backends = (
        cpu,
        cuda,
        MultiDeviceBackend(
            [BackendLayers(cuda, 0, 1), BackendLayers(cpu, 1, 2), BackendLayers(cuda, 2, model.layer_count)]
        ),
    )
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
