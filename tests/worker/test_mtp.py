"""Tests of MTP heads at the last stage: the rows that they read, and drafts that do not depend on chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask, ScoreTask
from llamaclust.kernels.backend import Backend, Batch
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import FAMILIES, nextn_program
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.worker.stage.nextn import following
from llamaclust.worker.stage.stage_runner import StageRunner, plan_memory, program_memory
from llamaclust.worker.stage.stage_runner import nextn_memory as memory_of_head
from support.models.tiny.nextn_models import with_nextn
from support.seed import SEED

_TOKENS, _BLOCK = 40, 16
_LIMITS = StageLimits(64, 16, 4, 256, 24, nextn=True)
_TASK = SampleTask(SamplingParams(), 0, 0, 0)


def _row(token: int) -> RowResult:
    return RowResult(token, -1.0)


@pytest.mark.parametrize(
    ("chunk", "results", "tasks", "expected"),
    [
        (Chunk((5,), 3, (0, 1), 1), [_row(7)], [_TASK], ((7,), 0)),
        (Chunk((5, 7, 8), 3, (0, 1), 3), [_row(7), _row(8), _row(9)], [_TASK] * 3, ((7, 8, 9), 2)),
        (Chunk((5, 7, 8), 3, (0, 1), 3), [_row(7), _row(6), _row(9)], [_TASK] * 3, ((7, 6), 1)),
        (Chunk((5, 7, 8), 3, (0, 1), 3), [_row(2), _row(6), _row(9)], [_TASK] * 3, ((2,), 0)),
        (Chunk((5, 7, 8), 3, (0, 1), 3), [_row(7), _row(-1), _row(9)], [_TASK] * 3, ((7,), None)),
        (Chunk((5, 7, 8), 3, (0, 1), 1), [_row(4)], [_TASK], ((7, 8, 4), 0)),
        (Chunk((5, 7, 8), 3, (0, 1), 0), [], [], ((7, 8), None)),
        (Chunk((5, 7, 8), 3, (0, 1), 0, next_token=2), [], [], ((7, 8, 2), None)),
        (Chunk((5, 7), 3, (0, 1), 2), [_row(7), _row(4)], [ScoreTask(7), _TASK], ((7, 4), 1)),
        (Chunk((5, 7), 3, (0, 1), 2, next_token=1), [_row(7), _row(1)], [ScoreTask(7), ScoreTask(1)], ((7, 1), None)),
        (Chunk((5,), 3, (0, 1), 0), [], [], ((), None)),
        (Chunk((5,), 3, (0, 1), 1), [_row(-1)], [_TASK], ((), None)),
    ],
)
def test_rows_count_as_far_as_the_ones_before_chose_them(
    chunk: Chunk, results: list[RowResult], tasks: list[RowTask], expected: tuple[tuple[int, ...], int | None]
) -> None:
    scored = [isinstance(task, ScoreTask) for task in tasks]
    assert following(chunk.tokens, chunk.next_token, [row.token for row in results], scored) == expected


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return Model.open(with_nextn(tmp_path / "model.gguf", request.param))


class OneSequence:
    """A stage of a whole model that computes one sequence in chunks of any size."""

    def __init__(self, backend: Backend, model: Model) -> None:
        self._runner = StageRunner(backend, model, 0, model.layer_count, _LIMITS)
        self._model_id = model.model_id
        self.table = (4, 4)

    def run(self, tokens: tuple[int, ...], position: int, outputs: int, **changes: int) -> tuple[RowResult, ...]:
        """Returns greedy results of the last rows."""
        chunk = replace(Chunk(tokens, position, self.table, outputs), **changes)  # type: ignore[arg-type]
        microbatch = Microbatch(self._model_id, 1, 0, (chunk,))
        end = position + len(tokens)
        tasks = tuple(replace(_TASK, position=end - outputs + row + 1) for row in range(outputs))
        inputs = SamplingInputs(1, 0, tasks)
        return self._runner.finish(self._runner.run(microbatch, None), inputs)


def _one_pass(backend: Backend, model: Model, tokens: list[int]) -> Iterator[int]:
    """Yields the head's token after each token except the last, with all rows computed at once."""
    count = len(tokens) - 1
    arrays = (np.array([0, count], np.int32), np.array([0, 4], np.int32), np.arange(4, dtype=np.int32))
    rows = np.arange(count, dtype=np.int32)
    batch = Batch(np.array(tokens[:-1], np.int32), rows, *arrays, rows)
    limits = StageLimits(64, 64, 1, 256, 8)
    trunk, head = model.program(0, model.layer_count), nextn_program(model)
    stage = backend.load(trunk, model.tensors_for(trunk), limits, lambda _: None)
    stage.run(batch, None)
    further = backend.load(head, model.tensors_for(head), limits, lambda _: None)
    logits = further.run(replace(batch, tokens=np.array(tokens[1:], np.int32)), stage.normed(rows))
    yield from map(int, logits.argmax(axis=1))


@pytest.mark.parametrize("backend", [CpuBackend(1), ReferenceBackend()], ids=["cpu", "reference"])
def test_drafts_are_those_of_one_pass_however_rows_are_computed(model: Model, backend: Backend) -> None:
    """Draws prompts until one has more than three different drafts, since greedy answers may repeat a token."""
    source = Random(SEED)
    for _ in range(20):
        tokens, drafted = _drafts_in_pieces(source, model, backend)
        expected = list(_one_pass(backend, model, tokens))
        assert drafted == {count: expected[count - 2] for count in drafted}, f"seed {SEED}"
        if len({*drafted.values()}) > 3:
            return
    pytest.fail(f"all prompts of seed {SEED} have at most three different drafts")


def _drafts_in_pieces(source: Random, model: Model, backend: Backend) -> tuple[list[int], dict[int, int]]:
    """Returns tokens, and drafts by the number of tokens before them. The prompt is computed in chunks, then steps have
    one token and correct, partly correct or wrong drafted rows; with states, all are correct, since a scheduler would
    write other states elsewhere."""
    sequence, plain = OneSequence(backend, model), OneSequence(backend, model)
    tokens = [source.randrange(3, 320) for _ in range(13)]
    (row,) = plain.run(tuple(tokens), 0, 1)
    while len(tokens) < _TOKENS:  # greedy continuation
        tokens.append(row.token)
        (row,) = plain.run((tokens[-1],), len(tokens) - 1, 1)
    drafted: dict[int, int] = {}
    at = 0
    while at < 12:  # the prompt without its last token
        end = min(12, at + source.randrange(1, 6))
        sequence.run(tuple(tokens[at:end]), at, 0, next_token=tokens[end])
        at = end
    while at < _TOKENS - 8:
        right = source.randrange(0, 4)
        wrong = [source.randrange(3, 320) for _ in range(0 if model.has_states else source.randrange(0, 3))]
        window = (tokens[at], *tokens[at + 1 : at + 1 + right], *wrong)
        rows = sequence.run(window, at, len(window), drafts=1)
        ends = [place for place, row in enumerate(rows) if row.drafted]
        assert len(ends) == 1, f"seed {SEED}"
        at += ends[0] + 1
        assert rows[ends[0]].token == tokens[at], f"seed {SEED}"
        (drafted[at + 1],) = rows[ends[0]].drafted
    return tokens, drafted


def test_further_tokens_follow_from_the_heads_own(model: Model) -> None:
    """Heads draft as many tokens as requested, up to the end of the blocks; shorter drafts are prefixes of longer
    ones."""
    source, backend = Random(SEED), CpuBackend(1)
    tokens = tuple(source.randrange(3, 320) for _ in range(9))
    found = [OneSequence(backend, model).run(tokens, 0, 1, drafts=most)[0].drafted for most in (1, 3, 6)]
    assert [len(each) for each in found] == [1, 3, 6]
    assert found[0] == found[1][:1] and found[1] == found[2][:3], f"seed {SEED}"
    short = OneSequence(backend, model)
    short.table = (4, 1)
    assert short.run(tokens, 0, 1, drafts=32)[0].drafted[:6] == found[2]
    again = OneSequence(backend, model)
    again.table = (4, 1)
    assert len(again.run(tokens, 0, 1, drafts=32)[0].drafted) == _BLOCK - len(tokens) + 1


def test_drafted_keys_are_overwritten(model: Model) -> None:
    """A step after drafts gives the same result as without drafts."""
    source, backend = Random(SEED), CpuBackend(1)
    tokens = tuple(source.randrange(3, 320) for _ in range(9))
    found = []
    for most in (1, 8):
        sequence = OneSequence(backend, model)
        (row,) = sequence.run(tokens, 0, 1, drafts=most)
        found.append(sequence.run((row.token,), len(tokens), 1, drafts=4)[0])
    assert found[0] == found[1], f"seed {SEED}"
    assert len(found[0].drafted) == 4


def test_memory_is_what_was_planned(model: Model) -> None:
    backend, layers = CpuBackend(1), model.layer_count
    runner = StageRunner(backend, model, 1, layers, _LIMITS)
    program = model.program(1, layers, context_tokens=_LIMITS.max_context_tokens)
    beside = memory_of_head(CpuBackend(1), model, program, _LIMITS)
    alone = program_memory(CpuBackend(1), model, program, _LIMITS)
    assert runner.memory.parts == {name: alone.parts[name] + beside.parts[name] for name in alone.parts}
    first = plan_memory(CpuBackend(1), model, 0, 1, _LIMITS)
    assert StageRunner(CpuBackend(1), model, 0, 1, _LIMITS).memory.parts == first.parts
