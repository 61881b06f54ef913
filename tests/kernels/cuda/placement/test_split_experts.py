"""Checks that stages with experts in RAM and the rest on a GPU give the bits of one processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.device import Device, Graph
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.split_experts import SplitExpertsBackend, SplitExpertsStage, experts_of, without_experts
from llamaclust.model.loader import Model
from support.arithmetic.batches import batch_of, load_stage
from support.cuda.stages import LIMITS, ROWS, Open, random_tokens, run, same
from support.seed import SEED

FAMILIES = ("moe", "llama-experts", "qwen2moe", "glm4moe", "bailingmoe2", "minimax-m2", "gpt-oss", "gemma4-experts")


def split(cuda: CudaBackend, cpu: CpuBackend, start: int, end: int) -> Backend:
    return SplitExpertsBackend(cuda, cpu, range(start, end))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_single_tokens(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """Covers architectures whose experts have no GPU kernels."""
    model = opened(name)
    tokens = random_tokens(model)
    wanted = run(cpu, model, tokens, ROWS)
    everywhere = split(cuda, cpu, 0, model.layer_count)
    for chunk in (ROWS, 5, 1):
        same(run(everywhere, model, tokens, chunk), wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_layers(opened: Open, cpu: CpuBackend, cuda: CudaBackend, threads: int) -> None:
    model = opened("moe")
    tokens, several = random_tokens(model), CpuBackend(threads)
    wanted = run(cpu, model, tokens, ROWS)
    for layers in ((0, 1), (1, 2), (2, 3), (1, 3)):
        same(run(split(cuda, several, *layers), model, tokens, 7), wanted)


def test_chains_with_whole_layers(opened: Open, cpu: CpuBackend, cuda: CudaBackend) -> None:
    """Covers several devices of one worker, with the first layer in RAM, and stages of several workers."""
    model = opened("moe")
    tokens = random_tokens(model)
    wanted = run(cpu, model, tokens, ROWS)
    its = split(cuda, cpu, 1, 2)
    same(run(MultiDeviceBackend([BackendLayers(cpu, 0, 1), BackendLayers(its, 1, 3)]), model, tokens, 6), wanted)
    for first, last, cut in ((its, cuda, 2), (cpu, split(cuda, cpu, 1, 3), 1), (split(cuda, cpu, 0, 1), cpu, 1)):
        stages = [load_stage(first, model, 0, cut, LIMITS), load_stage(last, model, cut, 3, LIMITS)]
        hidden: Float32 | None = None
        for stage in stages:
            hidden = stage.run(batch_of([(tokens, range(ROWS), [3, 5])]), hidden)
        assert hidden is not None
        same(hidden, wanted)
        for stage in stages:
            stage.close()


def test_sequences_at_random_places(opened: Open, cpu: CpuBackend, cuda: CudaBackend) -> None:
    """Microbatches mix prompts and single tokens, with outputs of random rows."""
    model, random = opened("glm4moe"), np.random.default_rng(SEED)
    stages = [load_stage(backend, model, limits=LIMITS) for backend in (cpu, split(cuda, cpu, 0, model.layer_count))]
    at, tables = [0, 0, 0], [[0, 1, 2], [5, 4, 3], [8, 6, 7]]
    for number in range(12):
        parts = []
        for sequence, table in enumerate(tables):
            rows = int(random.choice([0, 1, 1, 6])) if number else 2
            if rows and at[sequence] + rows <= 48:
                tokens = random.integers(3, model.hyperparameters.vocabulary_size, rows)
                parts.append((tokens, range(at[sequence], at[sequence] + rows), table))
                at[sequence] += rows
        if not parts:
            continue
        total = sum(len(part[1]) for part in parts)
        outputs = sorted(random.choice(total, int(random.integers(0, total + 1)), replace=False).tolist())
        wanted, found = (stage.run(batch_of(parts, outputs=outputs), None).copy() for stage in stages)
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), f"microbatch {number}")
    for stage in stages:
        stage.close()


def test_graphs_of_segments(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each segment between the experts of two layers is a graph; `graphs=False` captures none."""
    model, captured, capture = opened("moe"), list[Graph](), device.capture

    def counted(work: Callable[[], None]) -> Graph:
        captured.append(capture(work))
        return captured[-1]

    monkeypatch.setattr(device, "capture", counted)
    tokens = random_tokens(model, 6)
    wanted = run(cpu, model, tokens, 6)
    same(run(split(cuda, cpu, 0, 2), model, tokens, 1), wanted)
    assert len(captured) == 3, "two exchanges, one shape"
    plain = CudaBackend("cuda:0", device, 1, graphs=False)
    same(run(split(plain, cpu, 0, 2), model, tokens, 1), wanted)
    assert len(captured) == 3


def test_memory_is_that_of_both_devices(opened: Open, cpu: CpuBackend, cuda: CudaBackend) -> None:
    model = opened("glm4moe")
    layers = range(model.layer_count)
    program = model.program(0, model.layer_count)
    tensors, backend = model.tensors_for(program), SplitExpertsBackend(cuda, cpu, layers)
    stage = backend.load(program, tensors, LIMITS, lambda done_bytes: None)
    assert isinstance(stage, SplitExpertsStage)
    rest, experts = without_experts(program, layers), experts_of(program, layers)
    assert experts is not None
    assert {*rest.weights} | {*experts.weights} == {*program.weights} and not {*rest.weights} & {*experts.weights}
    assert stage.rest.weight_bytes == bytes_of(model, rest.weights)
    assert stage.experts.weight_bytes == bytes_of(model, experts.weights)
    assert stage.workspace_bytes == backend.workspace_bytes(program, tensors, LIMITS)
    assert backend.held_bytes(program, tensors) > 0
    stage.close()


def test_layers_without_experts(opened: Open, cpu: CpuBackend, cuda: CudaBackend) -> None:
    """The GPU computes layers without experts, such as the first ones of some models."""
    model = opened("glm4moe")
    program = model.program(0, 1)
    assert experts_of(program, range(1)) is None
    backend = SplitExpertsBackend(cuda, cpu, range(1))
    tensors = model.tensors_for(program)
    stage = backend.load(program, tensors, LIMITS, lambda done_bytes: None)
    assert stage.workspace_bytes == backend.workspace_bytes(program, tensors, LIMITS)
    stage.close()


def bytes_of(model: Model, names: Sequence[str]) -> int:
    return sum(model.file.tensor(name).resident_bytes for name in names)
