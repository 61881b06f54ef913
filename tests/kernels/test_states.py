"""States of sequences: the same bits in any chunks, in whole memory or in blocks that are given up; and clusters that
keep them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.scheduler.kv_groups import WindowGroup
from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Float32, kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS, Buffer, Convolution
from llamaclust.model.states import STATE_WINDOW
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from llamaclust.worker.stage.batches import build_batch
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import Case, Weight, check_conformance, normal, program_of, rows_at
from support.clusters.invariance import Answer, Way, check_answers, make_work, run
from support.models.tiny_architectures import VOCABULARY, build_architecture
from support.plans.plan_inputs import REQUEST

LIMITS = StageLimits(max_batch_tokens=128, max_outputs=128, max_sequences=4, max_context_tokens=256, kv_blocks=40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_architecture(tmp_path_factory.mktemp("states") / "lfm2.gguf", "lfm2")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.open(path) as model:
        yield model


def random_tokens(count: int, seed: int = 3) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCABULARY, count)]


def bits(rows: Float32) -> bytes:
    return rows.astype("<f4").tobytes()


@pytest.mark.parametrize(("taps", "width", "bias"), [(2, 16, False), (3, 144, True), (4, 272, False), (16, 48, True)])
def test_convolutions_are_those_of_the_reference(tmp_path: Path, taps: int, width: int, bias: bool) -> None:
    """Chunks go on where earlier ones ended, within blocks and at their borders, shorter than the state and longer."""
    generator, x, out = generator_of(taps, width), Buffer("x", width), Buffer("out", width)
    weights = {"weight": Weight(normal(generator, width, taps)), "bias": Weight(normal(generator, width))}
    step = Convolution(x, out, "weight", taps, 1, "bias" if bias else None)
    chunks = [range(1), range(1, 3), range(3, 16), range(16, 17), range(17, 70), range(70, 96), range(96, 97)]
    runs = [(rows_at(positions), normal(generator, len(positions), width)) for positions in chunks]
    check_conformance(tmp_path, Case(program_of(x, out, step), weights, runs), EXACT)


def in_ring(model: Model, backend: Backend, tokens: list[int], limits: StageLimits, chunk: int) -> tuple[Float32, int]:
    """Logits of all rows and the stage's KV memory; window blocks are a ring that is written over again and again."""
    program = model.program(0, model.layer_count, KvType(limits.kv_type), limits.max_context_tokens)
    stage = backend.load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    assert stage.kv_bytes == kv_bytes(program, limits)
    rows = []
    for at in range(0, len(tokens), chunk):
        part = tuple(tokens[at : at + chunk])
        first, end = WindowGroup(STATE_WINDOW, chunk).first_seen(at), -(-(at + len(part)) // KV_BLOCK_TOKENS)
        ring = tuple(n for block in range(first, end) for n in (block % max(1, limits.window_blocks), 1))
        shown = (ring, first) if limits.window_blocks else ((), 0)
        one = Microbatch("m", 1, 0, (Chunk(part, at, (0, -(-len(tokens) // 16)), len(part), None, *shown),))
        rows.append(stage.run(build_batch(one, limits, VOCABULARY, program.window), None).copy())
    stage.close()
    return np.concatenate(rows), stage.kv_bytes


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_given_up_states_change_no_bit(model: Model, chunk: int) -> None:
    tokens, group = random_tokens(120), WindowGroup(STATE_WINDOW, chunk)
    less = replace(LIMITS, window_blocks=group.sequence_blocks + group.row_blocks)
    for backend in (all_threads(2), ReferenceBackend()):
        wanted, all_bytes = in_ring(model, backend, tokens, LIMITS, len(tokens))
        found, kept_bytes = in_ring(model, backend, tokens, less, chunk)
        assert bits(found) == bits(wanted)
        assert kept_bytes < all_bytes


def test_sequences_of_one_batch_have_states_of_their_own(model: Model) -> None:
    """Also those that share a beginning, from which they go on in blocks of their own."""
    first, second = random_tokens(60), random_tokens(60, 4)
    second[:32] = first[:32]
    stage, alone = load_stage(CpuBackend(3), model, limits=LIMITS), load_stage(CpuBackend(1), model, limits=LIMITS)
    stage.run(batch_of([(first[:40], range(40), [9, 4, 7])]), None)
    both = batch_of([(second[32:50], range(32, 50), [9, 4, 1, 2]), (first[40:60], range(40, 60), [9, 4, 7, 3])])
    found = stage.run(both, None).copy()
    wanted = [alone.run(batch_of([(tokens, range(60), [0, 1, 2, 3])]), None).copy() for tokens in (second, first)]
    assert bits(found) == bits(np.concatenate([wanted[0][32:50], wanted[1][40:60]]))


def test_a_state_that_is_not_there_is_refused(model: Model) -> None:
    limits = replace(LIMITS, window_blocks=4)
    stage = load_stage(CpuBackend(1), model, limits=limits)
    batch = batch_of([([5], [32], [0, 1, 2])])
    good = replace(batch, window_tables=np.array([-1, 3, 0], np.int32))
    assert np.isfinite(stage.run(good, None)).all()
    for tables in ([-1, -1, 0], [-1, 3, -1], [-1, 4, 0]):
        bad = replace(batch, window_tables=np.array(tables, np.int32))
        with pytest.raises(ValueError, match="window block"):
            stage.run(bad, None)


def test_costs_count_states_as_what_windows_give_up(model: Model) -> None:
    """Two rows of 64 float32 numbers in a block of each convolution; keys and values of two heads of 16 channels."""
    layers = model.costs(KvType.F16).layers
    assert [layer.kv_bytes_per_token * KV_BLOCK_TOKENS for layer in layers] == [512, 512, 2048, 512, 2048]
    assert [layer.window_bytes_per_token * KV_BLOCK_TOKENS for layer in layers] == [512, 512, 0, 512, 0]


def test_a_plan_counts_the_memory_of_states(model: Model) -> None:
    request = replace(REQUEST, context_length=4096, max_batch_tokens=64)
    memory = MemoryModel(StageCosts.of(model.costs(KvType.F16)), request)
    limits = replace(LIMITS, kv_blocks=300, window_blocks=memory.window_blocks(300))
    assert 0 < limits.window_blocks < 300
    for start, end in ((0, 5), (0, 2), (2, 3), (1, 4)):
        assert memory.kv_bytes(start, end, 300) == kv_bytes(model.program(start, end), limits)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shortconv.l_cache": None}, "shortconv.l_cache.*missing"),
        ({"shortconv.l_cache": 1}, "shortconv.l_cache': 1, 2 to 16 expected"),
        ({"shortconv.l_cache": 17}, "shortconv.l_cache': 17, 2 to 16 expected"),
        ({"shortconv.l_cache": 4}, r"blk.0.shortconv.conv.weight: shape \[3, 64\], \[4, 64\] expected"),
        ({"attention.head_count_kv": 2}, "blk.0.attn_q.weight.*missing"),
        ({"attention.head_count_kv": np.array([0, 0, 2, 0], np.int32)}, "head_count_kv': 4 numbers for 5 layers"),
        ({"attention.head_count_kv": np.zeros(5, np.int32)}, "head_count_kv"),
        ({"attention.head_count_kv": np.array([0, 0, 2, 0, -1], np.int32)}, "head_count_kv': -1"),
    ],
)
def test_bad_keys_are_refused(model: Model, keys: dict[str, Any], message: str) -> None:
    changed = {f"lfm2.{key}": value for key, value in keys.items()}
    metadata = {key: value for key, value in {**model.file.metadata, **changed}.items() if value is not None}
    with pytest.raises(ModelFileError, match=message):
        Model(replace(model.file, metadata=metadata))


@pytest.mark.parametrize(
    "way",
    [
        Way((0, 5), company=True, prefill_chunk=5, cached=True),
        Way((0, 1, 3, 5), threads=2, company=True, prefill_chunk=48, cached=True),
        Way((0, 2, 5), preempted=True),
    ],
    ids=["chunks", "cuts", "preempted"],
)
def test_a_cluster_keeps_states_and_says_the_same(
    path: Path, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[Answer]
) -> None:
    check_answers(run(path, way, make_work(20, VOCABULARY, 2, 16, 100), tmp_path, monkeypatch), expected)


@pytest.fixture(scope="module")
def expected(path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """Of one worker, request after request."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("one")
        return run(path, Way((0, 5), every=True), make_work(20, VOCABULARY, 2, 16, 100), folder, patch)
