"""Tests of layers with a window in separate KV blocks, released out of the window: equal bits, less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.kv import groups
from llamaclust.cluster.scheduler.kv.groups import WindowGroup
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Float32, kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Attention, Program
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.clusters.invariance import Way, make_work, run
from support.models.tiny_architectures import VOCABULARY, build_architecture
from support.wire.frame_reader import build_batch

LIMITS = StageLimits(max_batch_tokens=1200, max_outputs=1200, max_sequences=2, max_context_tokens=1200, kv_blocks=75)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_architecture(tmp_path_factory.mktemp("window") / "gemma3.gguf", "gemma3")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.open(path) as model:
        yield model


def program_of(model: Model, window: int, limits: StageLimits) -> Program:
    """Returns the model's program with another window in the layers that have a window."""
    program = model.program(0, model.layer_count, KvType(limits.kv_type), limits.max_context_tokens)
    steps = (
        replace(step, window=window) if isinstance(step, Attention) and step.window is not None else step
        for step in program.steps
    )
    return replace(program, steps=tuple(steps))


def logits(
    backend: Backend, model: Model, window: int, tokens: tuple[int, ...], limits: StageLimits, chunk: int
) -> tuple[Float32, int]:
    """Returns logits of all rows and the stage's KV bytes; the window's blocks are a ring buffer."""
    program = program_of(model, window, limits)
    stage = backend.load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    assert stage.kv_bytes == kv_bytes(program, limits)
    rows = []
    for at in range(0, len(tokens), chunk):
        part = tokens[at : at + chunk]
        first, end = WindowGroup(window, chunk).first_seen(at), -(-(at + len(part)) // 16)
        ring = tuple(n for block in range(first, end) for n in (block % max(1, limits.window_blocks), 1))
        shown = (ring, first) if limits.window_blocks else ((), 0)
        one = Microbatch("m", 1, 0, (Chunk(part, at, (0, -(-len(tokens) // 16)), len(part), None, *shown),))
        rows.append(stage.run(build_batch(one, limits, VOCABULARY, program.window), None).copy())
    stage.close()
    return np.concatenate(rows), stage.kv_bytes


def random_tokens(count: int, seed: int = 3) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist())


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize(("window", "chunk"), [(1, 7), (6, 64), (33, 1), (100, 48), (530, 90), (600, 1100)])
def test_rows_are_those_of_whole_memory(model: Model, window: int, chunk: int, kv_type: KvType) -> None:
    tokens = random_tokens(1100 if chunk > 7 else 120)
    backend = CpuBackend(2)
    whole = replace(LIMITS, kv_type=kv_type.value)
    group = WindowGroup(window, chunk)
    less = replace(whole, window_blocks=min(75, group.sequence_blocks + group.row_blocks))
    wanted, all_bytes = logits(backend, model, window, tokens, whole, len(tokens))
    found, kept_bytes = logits(backend, model, window, tokens, less, chunk)
    assert (wanted.view(np.uint32) == found.view(np.uint32)).all()
    assert kept_bytes < all_bytes or less.window_blocks == 75


@pytest.mark.parametrize(("window", "chunk"), [(1, 3), (6, 16), (20, 7)])
def test_the_reference_reads_no_block_that_is_not_there(model: Model, window: int, chunk: int) -> None:
    tokens, backend, group = random_tokens(70), ReferenceBackend(), WindowGroup(window, chunk)
    wanted, _ = logits(backend, model, window, tokens, LIMITS, 70)
    less = replace(LIMITS, window_blocks=group.sequence_blocks + group.row_blocks)
    found, _ = logits(backend, model, window, tokens, less, chunk)
    np.testing.assert_array_equal(found, wanted)


GOOD = Chunk((1,), 100, (0, 7), 1, None, (2, 3), 4)


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, window_table=()),
        replace(GOOD, window_table=(2, 2), window_start=5),
        replace(GOOD, window_table=(2, 2)),
        replace(GOOD, window_table=(2, 4)),
        replace(GOOD, window_table=(18, 3)),
    ],
)
def test_tables_that_lack_what_rows_see_are_refused(bad: Chunk) -> None:
    limits = replace(LIMITS, window_blocks=20)
    batch = build_batch(Microbatch("m", 1, 0, (GOOD,)), limits, VOCABULARY, 30)
    assert batch.window_tables is not None and batch.window_tables.tolist() == [-1] * 4 + [2, 3, 4]
    assert build_batch(Microbatch("m", 1, 0, (GOOD,)), limits, VOCABULARY, None).window_tables is None
    with pytest.raises(ProtocolError, match="window"):
        build_batch(Microbatch("m", 1, 0, (bad,)), limits, VOCABULARY, 30)


def test_kernels_refuse_a_window_block_that_is_not_there(model: Model) -> None:
    limits = replace(LIMITS, window_blocks=20)
    program = program_of(model, 30, limits)
    stage = CpuBackend(1).load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    batch = build_batch(Microbatch("m", 1, 0, (GOOD,)), limits, VOCABULARY, 30)
    stage.run(batch, None)
    assert batch.window_tables is not None
    for place, block in ((4, -1), (6, 20)):
        tables = batch.window_tables.copy()
        tables[place] = block
        with pytest.raises(ValueError, match="window block"):
            stage.run(replace(batch, window_tables=tables), None)
    with pytest.raises(ValueError, match="window_tables"):
        stage.run(replace(batch, window_tables=None), None)


def test_a_model_in_this_process_keeps_windows_and_says_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LocalSettings(context_length=1024, max_sequences=4)
    prompts = [list(random_tokens(530)), list(random_tokens(40, 5)), list(random_tokens(530))]

    def said() -> tuple[list[tuple[list[int], list[float]]], bytes, int]:
        with LocalClient(path, 1, settings=settings) as client:
            replies = [client.generate(ids, max_tokens=30, ignore_eos=True) for ids in prompts]
            memory = client._stage._runner.memory.kv_bytes
            rows = client.logits(random_tokens(700))
            return [(list(one.token_ids), list(one.logprobs)) for one in replies], rows.tobytes(), memory

    less = said()
    monkeypatch.setattr(groups, "window_group", lambda *figures: None)
    whole = said()
    assert less[:2] == whole[:2]
    assert less[2] < whole[2]


@pytest.mark.parametrize("cut", [(0, 3, 7)])
def test_a_cluster_keeps_windows_and_says_the_same(
    path: Path, cut: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make_work(20, VOCABULARY, 2, 32)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    less = run(path, Way(cut, company=True, prefill_chunk=48, cached=True), work, tmp_path / "a", monkeypatch)
    monkeypatch.setattr(groups, "window_group", lambda *figures: None)
    whole = run(path, Way((0, 7), company=True), work, tmp_path / "b", monkeypatch)
    assert less == whole
