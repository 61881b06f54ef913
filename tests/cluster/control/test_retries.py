"""Tests of rows with non-finite logits: they are computed again without damaged blocks; a repeated failure is final."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from llamaclust.cluster.scheduler.requests import Failed, GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampler.results import RowResult
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

SETTINGS = SchedulerSettings(
    "m", VOCABULARY, context_length=200, kv_blocks=40, max_sequences=6, max_waiting=64, prefill_chunk=24
)
DAMAGED = VOCABULARY
NONE = RowResult(-1, float("nan"), failure="the logits are not finite numbers")


@dataclass
class Glitching(FakeModel):
    """A model that damages the stored values of each chunk that is `hit`, and every row that reads them."""

    hit: Callable[[int, Chunk], bool] = lambda number, chunk: False
    glitches: int = 0
    given: dict[str, int] = field(default_factory=dict)

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        rows = list(super().run(microbatch, inputs))
        last = 0
        for chunk in microbatch.chunks:
            table, end = self._table(chunk), chunk.position + len(chunk.tokens)
            if self.hit(microbatch.number, chunk):
                self.glitches += 1
                for position in range(chunk.position, end):
                    self.kv[table[position // 16]][position % 16] = DAMAGED
            last += chunk.outputs
            if DAMAGED in self._read(table, end):
                rows[last - chunk.outputs : last] = [NONE] * chunk.outputs
        return tuple(rows)


def simulation(source: Random, model: FakeModel) -> Simulation:
    fake = FakeStages(model, [linear(source.randrange(50, 2000), 10)] * source.randrange(1, 4), 100_000)
    return Simulation(Scheduler(SETTINGS, 1, len(fake.stage_ns)), fake)


def generations(source: Random, count: int) -> list[GenerationRequest]:
    """Draws requests with one of two beginnings, so that they share blocks."""
    starts = [tuple(source.randrange(VOCABULARY) for _ in range(50)) for _ in range(2)]
    return [
        GenerationRequest(
            f"r{i}",
            source.choice(starts) + tuple(source.randrange(VOCABULARY) for _ in range(source.randrange(1, 40))),
            source.choice((5, 40)),
            seed=i,
            score_from=source.choice((None, 1)),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("number", range(16))
def test_a_stage_that_is_wrong_once_changes_no_token(number: int) -> None:
    print(f"seed {SEED}, {number}")
    source = Random(f"{SEED} {number}")
    at = source.randrange(1, 60)
    model = Glitching(SETTINGS.kv_blocks)
    model.hit = lambda number, chunk: number >= at and not model.glitches
    run = simulation(source, model)
    requests = generations(source, 14)
    keys = [run.add(request) for request in requests]
    run.finish()
    for key, request in zip(keys, requests, strict=True):
        chosen, scored, _ = expected(request, 200)
        assert (run.rows(key), run.scores(key)) == (chosen, scored)
    assert model.glitches == 1 and run.scheduler.counts.kv_blocks_held == 0
    late = generations(Random(f"{SEED} {number}"), 14)[:2]  # damaged values are not in the prefix cache either
    again = [run.add(request) for request in late]
    run.finish()
    assert [run.rows(key) for key in again] == [expected(request, 200)[0] for request in late]


def test_a_request_that_fails_again_ends_alone() -> None:
    source = Random(SEED)
    model = Glitching(SETTINGS.kv_blocks, hit=lambda number, chunk: 99 in chunk.tokens)
    run = simulation(source, model)
    good = [GenerationRequest(f"g{i}", tuple(range(20 + i)), 30, seed=i) for i in range(3)]
    keys = [run.add(request) for request in good]
    bad = run.add(GenerationRequest("bad", (1, 2, 99), 30))
    run.finish()
    assert NONE.failure is not None and run.updates[bad] == [Failed(NONE.failure)]
    counts = run.scheduler.counts
    assert counts.retries >= 1 and counts.preemptions == 0 and counts.kv_blocks_held == 0
    assert [len(run.updates[key]) > 1 for key in keys] == [True] * 3
