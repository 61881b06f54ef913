"""Requests that break pipelines: each ends alone, after few failures; whatever else fails, no other one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.wire.microbatch.messages import Microbatch
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=200, kv_blocks=60, max_sequences=32, max_waiting=64)


@dataclass
class Poisonable:
    """A scheduler whose pipeline fails at microbatches that a test names, and is replaced then."""

    source: Random
    settings: SchedulerSettings = SETTINGS
    poisoned: frozenset[int] = frozenset()  # seeds
    names_microbatch: bool = False
    run: Simulation = field(init=False)
    failures: int = 0
    failed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        stages = self._stages()
        self.run = Simulation(Scheduler(self.settings, 1, len(stages.stage_ns)), stages)

    def _stages(self) -> FakeStages:
        return FakeStages(FakeModel(self.settings.kv_blocks), [linear(100, 10)] * self.source.randrange(1, 4))

    def breaks(self, microbatch: Microbatch) -> bool:
        number, scheduler = microbatch.number, self.run.scheduler
        return any(
            taken.sequence.request.seed in self.poisoned and taken.sequence.generated >= 5
            for taken in scheduler.in_flight.slices(number)
        )

    def step(self) -> bool:
        """A result, or a failure where the next one is of a microbatch that breaks its stage."""
        self.run.send_all()
        sent = len(self.run.sent)
        if sent and self.breaks(self.run.microbatches[-sent].microbatch):
            self.fail(self.run.microbatches[-sent].microbatch.number if self.names_microbatch else None)
            return True
        return self.run.step()

    def fail(self, number: int | None = None) -> None:
        scheduler = self.run.scheduler
        self.failures += 1
        for sequence in scheduler.strikes.add(scheduler.in_flight.slices(number)):
            self.failed.append(sequence.request.seed)
            scheduler.abort(sequence.key)
        self.run.stages = self._stages()
        self.run.sent.clear()
        scheduler.restart(self.settings, self.failures + 1, len(self.run.stages.stage_ns))

    def finish(self) -> None:
        while self.step():
            pass
        assert not self.run.scheduler.sequences
        assert self.run.scheduler.queues.memory.blocks.held == 0


def requests(source: Random, count: int) -> list[GenerationRequest]:
    lengths = [source.randrange(1, 60) for _ in range(count)]
    prompts = [tuple(source.randrange(VOCABULARY) for _ in range(length)) for length in lengths]
    return [GenerationRequest(f"r{i}", prompt, 40, seed=i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("names_microbatch", [False, True])
@pytest.mark.parametrize("kv_blocks", [60, 400])
@pytest.mark.parametrize("poisoned", [1, 3])
def test_a_request_that_breaks_pipelines_fails_alone(names_microbatch: bool, kv_blocks: int, poisoned: int) -> None:
    print(f"seed {SEED}")
    source = Random(SEED)
    settings = SchedulerSettings("m", VOCABULARY, context_length=200, kv_blocks=kv_blocks, max_waiting=64)
    seeds = frozenset(source.sample(range(33), poisoned))
    run = Poisonable(source, settings, poisoned=seeds, names_microbatch=names_microbatch)
    generations = requests(source, 33)
    keys = [run.run.add(generation) for generation in generations]
    run.finish()
    assert sorted(run.failed) == sorted(seeds)
    assert run.failures <= MAX_STRIKES * poisoned
    for key, generation in zip(keys, generations, strict=True):
        answered = run.run.rows(key)
        wanted = expected(generation, settings.context_length)[0]
        assert answered == (wanted[:5] if generation.seed in seeds else wanted)


@pytest.mark.parametrize("number", range(8))
def test_failures_of_other_causes_end_no_request(number: int) -> None:
    """However often: what was in flight then is computed soon."""
    print(f"seed {SEED}, {number}")
    source = Random(f"{SEED} {number}")
    run = Poisonable(source)
    generations = requests(source, 33)
    keys = [run.run.add(generation) for generation in generations]
    while run.run.scheduler.sequences:
        for _ in range(source.randrange(4, 60)):
            run.step()
        if run.failures < 100:
            run.run.send_all()
            run.fail()
    assert not run.failed
    for key, generation in zip(keys, generations, strict=True):
        assert run.run.rows(key) == expected(generation, SETTINGS.context_length)[0]


def test_requests_that_are_cancelled_while_they_are_isolated() -> None:
    source = Random(SEED)
    run = Poisonable(source)
    keys = [run.run.add(generation) for generation in requests(source, 3)]
    for _ in range(2):
        run.run.send_all()
        run.fail()
    while (isolated := run.run.scheduler.strikes.isolated) is not None:
        run.run.send_all()
        (taken,) = run.run.scheduler.in_flight.slices()
        assert taken.sequence is isolated
        run.run.scheduler.abort(isolated.key)
        run.step()
    assert {key for key in keys if run.run.updates[key]} == set()
    run.finish()
