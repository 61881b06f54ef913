"""Tests of sequence states: equal bits in any chunks, in KV blocks or in state blocks; and clusters that keep
states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, BatchStates, Float32, Stage, kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Buffer, Convolution
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import Case, Weight, check_conformance, normal, program_of, rows_at
from support.clusters.invariance import Answer, Way, check_answers, make_work, run
from support.models.tiny_architectures import VOCABULARY, build_architecture
from support.plans.plan_inputs import REQUEST
from support.wire.frame_reader import build_batch

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
    """Chunks end within blocks and at their borders, and are shorter or longer than the state."""
    generator, x, out = generator_of(taps, width), Buffer("x", width), Buffer("out", width)
    weights = {"weight": Weight(normal(generator, width, taps)), "bias": Weight(normal(generator, width))}
    step = Convolution(x, out, "weight", taps, 1, "bias" if bias else None)
    chunks = [range(1), range(1, 3), range(3, 16), range(16, 17), range(17, 70), range(70, 96), range(96, 97)]
    runs = [(rows_at(positions), normal(generator, len(positions), width)) for positions in chunks]
    check_conformance(tmp_path, Case(program_of(x, out, step), weights, runs), EXACT)


def in_chunks(
    model: Model, backend: Backend, tokens: list[int], limits: StageLimits, chunk: int, span: int = 0
) -> tuple[Float32, int]:
    """Returns logits of all rows and the stage's KV bytes. With state blocks, the next chunk reads the state after each
    `span` positions, which is kept; all other states are overwritten in place."""
    program = model.program(0, model.layer_count, KvType(limits.kv_type), limits.max_context_tokens)
    stage = backend.load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    assert stage.kv_bytes == kv_bytes(program, limits)
    rows, read, own = [], None, 0
    for at in range(0, len(tokens), chunk):
        part = tuple(tokens[at : at + chunk])
        whole = Chunk(part, at, (0, -(-len(tokens) // 16)), len(part))
        if limits.state_blocks:
            ends = [*range(at // span * span + span, at + len(part), span), at + len(part)]
            blocks = [own + number for number in range(len(ends))]
            states = tuple(n for end, block in zip(ends, blocks, strict=True) for n in (end - at, block))
            whole = replace(whole, state_from=read, state_to=states)
            read = blocks[-1]
            own = read + (ends[-1] % span == 0)
        one = Microbatch("m", 1, 0, (whole,))
        rows.append(stage.run(build_batch(one, limits, VOCABULARY, program.window), None).copy())
    stage.close()
    return np.concatenate(rows), stage.kv_bytes


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
@pytest.mark.parametrize("span", [16, 64])
def test_states_in_blocks_of_their_own_change_no_bit(model: Model, chunk: int, span: int) -> None:
    tokens, less = random_tokens(120), replace(LIMITS, state_blocks=120 // span + 2)
    for backend in (all_threads(2), ReferenceBackend()):
        wanted, all_bytes = in_chunks(model, backend, tokens, LIMITS, len(tokens))
        found, kept_bytes = in_chunks(model, backend, tokens, less, chunk, span)
        assert bits(found) == bits(wanted)
        assert kept_bytes < all_bytes


def test_sequences_go_on_from_a_state_that_stays(model: Model) -> None:
    """Two sequences of a batch read the state of a third one, which is kept, and write separate states."""
    tokens, limits = random_tokens(50), replace(LIMITS, state_blocks=4)
    others = [tokens[:32] + random_tokens(18, seed) for seed in (5, 6)]
    for backend in (all_threads(3), ReferenceBackend()):
        stage = load_stage(backend, model, limits=limits)

        def run(*chunks: Chunk, stage: Stage = stage) -> bytes:
            return bits(stage.run(build_batch(Microbatch("m", 1, 0, chunks), limits, VOCABULARY), None))

        run(Chunk(tuple(tokens[:40]), 0, (0, 3), 0, state_to=(32, 2, 40, 0)))
        both = [
            Chunk(tuple(rows[32:]), 32, (0, 2, 6 + 2 * place, 2), 18, state_from=2, state_to=(18, 1 + 2 * place))
            for place, rows in enumerate(others)
        ]
        found = [run(*both), run(*both)]
        assert found[0] == found[1], "the shared state was written"
        whole = [in_chunks(model, backend, rows, LIMITS, 50)[0][32:] for rows in others]
        assert found[0] == bits(np.concatenate(whole))


def test_sequences_of_one_batch_have_states_of_their_own(model: Model) -> None:
    """Sequences with a common prefix continue its state in separate blocks."""
    first, second = random_tokens(60), random_tokens(60, 4)
    second[:32] = first[:32]
    stage, alone = load_stage(CpuBackend(3), model, limits=LIMITS), load_stage(CpuBackend(1), model, limits=LIMITS)
    stage.run(batch_of([(first[:40], range(40), [9, 4, 7])]), None)
    both = batch_of([(second[32:50], range(32, 50), [9, 4, 1, 2]), (first[40:60], range(40, 60), [9, 4, 7, 3])])
    found = stage.run(both, None).copy()
    wanted = [alone.run(batch_of([(tokens, range(60), [0, 1, 2, 3])]), None).copy() for tokens in (second, first)]
    assert bits(found) == bits(np.concatenate([wanted[0][32:50], wanted[1][40:60]]))


def test_a_state_that_is_not_there_is_refused(model: Model) -> None:
    limits = replace(LIMITS, state_blocks=4)
    stage = load_stage(CpuBackend(1), model, limits=limits)

    def states(before: int, rows: list[int], blocks: list[int]) -> BatchStates:
        numbers = ([before], [0, len(blocks)], rows, blocks)
        return BatchStates(*(np.array(each, np.int32) for each in numbers))

    batch = batch_of([([5, 6], [32, 33], [0, 1, 2])])
    stage.run(replace(batch, states=states(3, [0, 1], [0, 3])), None)
    for bad in (
        states(-1, [1], [3]),
        states(4, [1], [3]),
        states(3, [1], [4]),
        states(3, [0], [3]),
        states(3, [1, 1], [0, 3]),
        states(3, [1, 2], [0, 3]),
        states(3, [], []),
    ):
        with pytest.raises(ValueError, match="state"):
            stage.run(replace(batch, states=bad), None)
    with pytest.raises(ValueError, match="states before sequences"):
        stage.run(batch, None)


def test_costs_count_states_apart(model: Model) -> None:
    """A convolution's state has two rows of 64 float32 numbers; attention has keys and values of two heads of 16
    channels."""
    layers = model.costs(KvType.F16).layers
    assert [layer.state_bytes for layer in layers] == [512, 512, 0, 512, 0]
    assert [layer.kv_bytes_per_token for layer in layers] == [0, 0, 128, 0, 128]


@pytest.mark.parametrize("kv_blocks", [64, 300, 5000])
def test_a_plan_counts_the_memory_of_states(model: Model, kv_blocks: int) -> None:
    request = replace(REQUEST, context_length=1024, max_batch_tokens=64)
    memory = MemoryModel(StageCosts.of(model.costs(KvType.F16)), request)
    limits = replace(LIMITS, kv_blocks=kv_blocks, state_blocks=memory.kv_groups.state_blocks(kv_blocks))
    assert limits.state_blocks > 2
    for start, end in ((0, 5), (0, 2), (2, 3), (1, 4)):
        program = model.program(start, end)
        assert memory.kv_bytes(start, end, kv_blocks) == kv_bytes(program, limits)
        stage = ReferenceBackend().load(program, model.tensors_for(program), limits, lambda done_bytes: None)
        assert stage.kv_bytes == memory.kv_bytes(start, end, kv_blocks)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shortconv.l_cache": None}, "shortconv.l_cache.*missing"),
        ({"shortconv.l_cache": 1}, "shortconv.l_cache': expected 2 to 16, found 1"),
        ({"shortconv.l_cache": 17}, "shortconv.l_cache': expected 2 to 16, found 17"),
        ({"shortconv.l_cache": 4}, r"blk.0.shortconv.conv.weight: expected shape \[4, 64\], found \[3, 64\]"),
        ({"attention.head_count_kv": 2}, "blk.0.attn_q.weight.*missing"),
        (
            {"attention.head_count_kv": np.array([0, 0, 2, 0], np.int32)},
            "head_count_kv': expected 5 numbers, one for each layer, found 4",
        ),
        ({"attention.head_count_kv": np.zeros(5, np.int32)}, "head_count_kv"),
        (
            {"attention.head_count_kv": np.array([0, 0, 2, 0, -1], np.int32)},
            "head_count_kv': expected 0 to .*, found -1",
        ),
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
    """Returns the answers of one worker that serves one request after another."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("one")
        return run(path, Way((0, 5), every=True), make_work(20, VOCABULARY, 2, 16, 100), folder, patch)
