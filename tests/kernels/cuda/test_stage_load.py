"""Tests of loading and closing stages on GPUs: memory to the byte, progress, rejections and lost GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread, get_ident

import pytest

from llamaclust.core.errors import DeviceLostError, InsufficientMemoryError, LlamaclustError, ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend, workspace_bytes
from llamaclust.kernels.cuda.device_weights import LoadProgress
from llamaclust.kernels.cuda.runtime.device import Bytes, Device, Launch
from llamaclust.kernels.multi_device import layers_of
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.model.loader import Model
from llamaclust.model.program import Slice
from llamaclust.worker.devices.workspace import planned_workspace_bytes
from support.arithmetic.batches import batch_of, load_stage
from support.cuda.stages import LIMITS, MODELS, Free, Open, random_tokens, run, same
from support.models.tiny_model import build_tiny_model


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_was_planned_to_the_byte(opened: Open, cuda: CudaBackend, device: Device, name: str) -> None:
    model, before = opened(name), Free.of(device)
    for start, end in ((0, model.layer_count), (1, 2), (0, 1)):
        program = model.program(start, end)
        tensors = model.tensors_for(program)
        stage = load_stage(cuda, model, start, end, LIMITS)
        weights = sum(tensor.resident_bytes for tensor in tensors.values())
        planned = weights, kv_bytes(program, LIMITS), cuda.workspace_bytes(program, tensors, LIMITS)
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
    folder = PackedCacheFolder(tmp_path / "packed", 1 << 30)
    for _ in range(2):
        same(run(CudaBackend("cuda:0", device, 1, folder), model, tokens, 4), wanted)
    assert list((tmp_path / "packed").rglob("*")), "nothing was kept"
    same(run(CpuBackend(1, packed_cache=folder), model, tokens, 4), wanted)


def test_what_does_not_fit_leaves_nothing_behind(opened: Open, cuda: CudaBackend, device: Device) -> None:
    model, before = opened("llama"), Free.of(device)
    with pytest.raises(InsufficientMemoryError):
        load_stage(cuda, model, limits=replace(LIMITS, kv_blocks=1 << 26))
    assert before.taken == 0


def test_host_memory_that_does_not_suffice_is_named(
    opened: Open, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Free.of(device)

    def load_tensors(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("llamaclust.kernels.cuda.device_weights.load_tensors", load_tensors)
    with pytest.raises(InsufficientMemoryError, match="RAM does not suffice to prepare two layers at a time"):
        load_stage(cuda, opened("llama"))
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
        serving.join(60)
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
        with pytest.raises(ValueError, match="outside"):
            stage.run(batch_of([([1] * rows, range(rows), table)], outputs=[0]), None)
    stage.close()


class _BusError(Exception):
    """A driver error."""


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


def test_parts_that_read_more_than_the_hidden_state_are_told_before_a_start(opened: Open) -> None:
    """Parts that read keys, values or a buffer of layers on another device are rejected; no plan makes such parts."""
    model = opened("gemma4-inputs")
    program = model.program(0, model.layer_count)
    first, _, *others = layers_of(program, 1, model.layer_count).steps
    assert isinstance(first, Slice)
    apart = replace(program, start=1, hidden=first.out, steps=tuple(others))
    shared = layers_of(program, 4, model.layer_count)
    for part, what in ((apart, "1 to 6 read inputs"), (shared, "4 to 6 read keys and values of layer 1")):
        with pytest.raises(ModelFileError, match=f"layers {what}, which are on another device; .*gpu_layers: 0"):
            workspace_bytes(part, model.file.tensors, LIMITS)


def test_heads_that_are_too_wide_are_told_before_a_start(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=1, hidden=1040, heads=2, kv_heads=2, ffn=64)
    limits = StageLimits(max_batch_tokens=8, max_outputs=8, max_sequences=2, max_context_tokens=64, kv_blocks=5)
    with (
        Model.open(path) as model,
        pytest.raises(ModelFileError, match="cannot be computed: heads have 520 channels"),
    ):
        planned_workspace_bytes(model, 0, 1, limits, 1, "cuda:0")


@pytest.mark.parametrize("at", [1, 3])
def test_a_gpu_that_is_lost_while_memory_is_pinned(
    opened: Open, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Loses the GPU at the first pinned buffer for weights, or at the first one of the stage."""
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
    progress = LoadProgress(told.append, 1000, 2)
    more, done = partial(progress.add_bytes, 500), progress.module_done
    for step in (more, more, done, done) if order == "weights first" else (done, done, more, more):
        step()
    assert told == ([500, 400, 50, 50] if order == "weights first" else [500, 500])


def test_kernels_are_compiled_while_weights_are_brought(
    opened: Open, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread compiles all kernels before the first launch."""
    packed_layers, launched, threads, launch = set[str](), set[str](), set[int](), device.launch

    def prepare(kernels: Iterable[str]) -> None:
        packed_layers.update(kernels)
        threads.add(get_ident())

    def note(one: Launch) -> None:
        launched.add(one.kernel)
        launch(one)

    monkeypatch.setattr(device, "prepare", prepare)
    monkeypatch.setattr(device, "launch", note)
    with closing(load_stage(CudaBackend("cuda:0", device, 1), opened("llama"), limits=LIMITS)) as stage:
        assert threads and get_ident() not in threads
        stage.run(batch_of([([1] * 9, range(9), range(1))]), None)
    assert launched and launched <= packed_layers
