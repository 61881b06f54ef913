"""Tests of the CPU executor on whole models: equal bits for any chunks, cuts, threads, levels and other sequences."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import available_levels
from llamaclust.kernels.backend import kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import Chain, batch_of
from support.models.tiny_model import build_tiny_model

Float32 = NDArray[np.float32]

LIMITS = StageLimits(max_batch_tokens=128, max_outputs=128, max_sequences=8, max_context_tokens=1024, kv_blocks=80)
TOKENS = np.random.default_rng(7).integers(0, 320, 100).tolist()


@pytest.fixture(
    scope="module", params=["llama-Q8_0", "llama-Q4_K", "qwen2-F16", "llama-experts-Q4_1", "llama-Q2_K", "qwen2-Q3_K"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    architecture, *experts, kind = request.param.split("-")
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    count = 4 if experts else 0
    build_tiny_model(path, architecture=architecture, quant_type=QuantType[kind], layers=3, experts=count)
    with Model.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(model: Model) -> Float32:
    """Returns logits at every position, computed on one thread in one batch."""
    found = logits(model, all_threads(1))
    assert len(np.unique(found)) > 0.9 * found.size
    return found


def logits(model: Model, backend: CpuBackend, cuts: tuple[int, ...] = (), chunk: int | None = None) -> Float32:
    chain = Chain(backend, model, cuts, LIMITS)
    found = chain.logits(TOKENS, chunk)
    chain.close()
    return found


def assert_same_bits(found: Float32, wanted: Float32) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("chunk", [1, 7, 8, 9, 64])
def test_any_chunks(model: Model, wanted: Float32, chunk: int) -> None:
    """Threads divide the rows of batches of eight or more."""
    for threads in (1, 2, 3):
        assert_same_bits(logits(model, all_threads(threads), chunk=chunk), wanted)


@pytest.mark.parametrize("level", available_levels())
def test_any_level(model: Model, wanted: Float32, level: str) -> None:
    assert_same_bits(logits(model, all_threads(2, level)), wanted)
    assert_same_bits(logits(model, all_threads(1, level), chunk=3), wanted)


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_any_cut(model: Model, wanted: Float32, cuts: tuple[int, ...]) -> None:
    assert_same_bits(logits(model, all_threads(2), cuts), wanted)
    assert_same_bits(logits(model, all_threads(3), cuts, chunk=5), wanted)


def test_any_neighbours_and_outputs(model: Model, wanted: Float32) -> None:
    """The batch has a chunk of the sequence between others, and logits of only some rows."""
    chain = Chain(all_threads(2), model, (), LIMITS)
    chain.run(batch_of([(TOKENS[:40], range(40), range(10))], outputs=[]))
    others = [([3], [0], [60]), (TOKENS[40:60], range(40, 60), range(10)), ([9, 8, 7], range(3), [61])]
    found = chain.run(batch_of(others, outputs=[0, 1, 5, 20, 23]))
    assert_same_bits(found[1:4], wanted[[40, 44, 59]])
    chain.close()


def test_no_outputs(model: Model) -> None:
    chain = Chain(all_threads(2), model, (), LIMITS)
    for rows in (1, 40):
        found = chain.run(batch_of([(TOKENS[:rows], range(rows), range(10))], outputs=[]))
        assert found.shape == (0, 320)
    chain.close()


def test_the_callers_floating_point_mode_does_not_matter(model: Model, wanted: Float32) -> None:
    """The calling thread rounds upward, as another library may have set, and still does so afterwards."""
    libm = ctypes.CDLL("libm.so.6")
    upward, nearest = 0x800, 0
    backend = all_threads(2)
    chain = Chain(backend, model, (), LIMITS)
    assert libm.fesetround(upward) == 0
    try:
        found = chain.logits(TOKENS)
        assert libm.fegetround() == upward
    finally:
        libm.fesetround(nearest)
    assert_same_bits(found, wanted)
    chain.close()


def test_stages_of_one_backend_run_from_several_threads(model: Model, wanted: Float32) -> None:
    backend = all_threads(2)
    chains = [Chain(backend, model, (1,), LIMITS) for _ in range(3)]
    with ThreadPoolExecutor(3) as callers:
        for found in callers.map(lambda chain: chain.logits(TOKENS, 11), chains):
            assert_same_bits(found, wanted)
    for chain in chains:
        chain.close()


def test_one_wrong_bit_of_a_weight_is_noticed(model: Model, wanted: Float32, tmp_path: Path) -> None:
    """The comparison of bits detects a change that argmax does not show."""
    source = model.file.tensors["blk.1.attn_v.weight"]
    data = bytearray(source.path.read_bytes())
    data[source.offset + source.n_bytes // 2 + 2] ^= 1
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data)
    with Model.open(changed) as other:
        found = logits(other, all_threads(2))
    assert (found.view(np.uint32) != wanted.view(np.uint32)).any()
    assert np.median(np.abs(found - wanted)) < 0.05


def test_memory_is_as_promised(model: Model) -> None:
    backend = all_threads(2)
    program = model.program(0, model.layer_count)
    stage = backend.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    assert stage.kv_bytes == kv_bytes(program, LIMITS)
    tensors = model.tensors_for(program)
    assert stage.weight_bytes == pytest.approx(sum(tensor.n_bytes for tensor in tensors.values()), rel=0.02)
    assert stage.workspace_bytes == backend.workspace_bytes(program, tensors, LIMITS)
    smaller, larger = (
        backend.workspace_bytes(program, tensors, StageLimits(rows, rows, 8, 1024, 80)) for rows in (64, 128)
    )
    widths = 256 * 5 + 64 * 2 + 512 * 2 + 320
    assert 4 * 64 * widths < larger - smaller < 12 * 64 * widths + (1 << 20)
    stage.close()


def test_every_bound_of_a_batch_is_checked(model: Model) -> None:
    backend = all_threads(1)
    program = model.program(0, model.layer_count)
    stage = backend.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    good = {
        "tokens": [1, 2, 3],
        "positions": [0, 1, 20],
        "sequence_starts": [0, 2, 3],
        "table_starts": [0, 1, 3],
        "block_tables": [5, 6, 79],
        "output_rows": [0, 2],
    }
    bad = [
        ("tokens", [1, 2]),
        ("tokens", [1, 2, 320]),
        ("tokens", [1, -1, 3]),
        ("positions", [0, 2, 20]),
        ("positions", [-1, 0, 20]),
        ("positions", [15, 16, 20]),
        ("positions", [0, 1, 32]),
        ("positions", [0, 1, 2**31 - 1]),
        ("positions", []),
        ("sequence_starts", [0, 2, 4]),
        ("sequence_starts", [0, 3, 3]),
        ("sequence_starts", [1, 2, 3]),
        ("sequence_starts", [0, -(2**31), 3]),
        ("sequence_starts", [0]),
        ("sequence_starts", []),
        ("table_starts", [0, 1]),
        ("table_starts", [0, 2, 1]),
        ("table_starts", [0, 1, 4]),
        ("block_tables", [5, 6, 80]),
        ("block_tables", [5, -1, 79]),
        ("output_rows", [0, 3]),
        ("output_rows", [2, 0]),
        ("output_rows", [1, 1]),
        ("output_rows", [-1]),
    ]

    def run(fields: dict[str, list[int]]) -> int:
        arrays: Any = {name: np.array(values, np.int32) for name, values in fields.items()}
        return stage._native.run(**arrays, hidden=None)  # type: ignore[union-attr]

    assert run(good) == 2
    for name, values in bad:
        with pytest.raises(ValueError, match="batch"):
            run({**good, name: values})
    long = {"tokens": [0] * 129, "positions": list(range(129)), "sequence_starts": [0, 129]}
    with pytest.raises(ValueError, match="rows"):
        run({**good, **long, "table_starts": [0, 9], "block_tables": list(range(9)), "output_rows": []})
    many = {"tokens": [0] * 9, "positions": [0] * 9, "sequence_starts": list(range(10)), "output_rows": []}
    with pytest.raises(ValueError, match="sequences"):
        run({**good, **many, "table_starts": list(range(10)), "block_tables": list(range(9))})
    assert run(good) == 2
    stage.close()


def test_hidden_states_must_fit(model: Model) -> None:
    backend = all_threads(1)
    program = model.program(1, 2)
    stage = backend.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    batch = batch_of([([0, 0], [0, 1], [0])])
    for shape in ((2, 255), (1, 256), (3, 256)):
        with pytest.raises(ValueError, match="hidden"):
            stage.run(batch, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="hidden"):
        stage.run(batch, None)
    assert stage.run(batch, np.zeros((2, 256), np.float32)).shape == (2, 256)
    stage.close()


def test_steps_follow_each_other_without_waiting_for_ever() -> None:
    """Creates and closes pools that have more threads than cores."""
    for threads, _ in itertools.product((1, 2, 5, 16), range(5)):
        CpuBackend(threads)
