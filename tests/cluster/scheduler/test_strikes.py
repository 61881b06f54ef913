"""Tests of requests that break pipelines: each ends alone after few failures, and no other request fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.wire.microbatch.messages import Microbatch
from support.clusters.fakes import VOCABULARY, ConstantModel, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=200, kv_blocks=60, max_sequences=32, max_waiting=64)
LARGE = replace(SETTINGS, context_length=4096, kv_blocks=8192, max_sequences=64)
S_NS = 1_000_000_000
RECOVERY_NS = S_NS // 2
STAGE = linear(3000, 400)  # about SmolLM2 on three workers, with two busy cores
LONG = 3000  # prompt tokens, more than are computed in a second


@dataclass
class Poisonable:
    """A scheduler whose pipeline fails at the microbatches that a test names, and is then replaced."""

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
        """Takes a result, or a failure if the next result is of a microbatch that breaks its stage."""
        self.run.send_all()
        sent = len(self.run.sent)
        if sent and self.breaks(self.run.microbatches[-sent].microbatch):
            self.fail(self.run.microbatches[-sent].microbatch.number if self.names_microbatch else None)
            return True
        return self.run.step()

    def fail(self, number: int | None = None) -> None:
        scheduler = self.run.scheduler
        self.failures += 1
        for struck in scheduler.strikes.add(scheduler.in_flight.slices(number)):
            self.failed.append(struck.sequence.request.seed)
            scheduler.abort(struck.sequence.key)
        self.run.stages = self._stages()
        self.run.sent.clear()
        scheduler.restart(self.settings, self.failures + 1, len(self.run.stages.stage_ns))

    def finish(self) -> None:
        while self.step():
            pass
        assert not self.run.scheduler.sequences
        assert self.run.scheduler.queues.memory.blocks.held == 0


@dataclass
class Timed(Poisonable):
    """A scheduler with the times of three workers that compute SmolLM2. A poisoned request breaks the pipeline when the
    row after five of its tokens is computed."""

    settings: SchedulerSettings = LARGE

    def _stages(self) -> FakeStages:
        made = FakeStages(ConstantModel(self.settings.kv_blocks), [STAGE] * 3)
        made.free_at = [self.run.now_ns if self.failures else 0] * 3
        return made

    def breaks(self, microbatch: Microbatch) -> bool:
        return any(
            taken.sequence.request.seed in self.poisoned
            and taken.chunk.position + len(taken.chunk.tokens) > taken.sequence.prompt_length + 4
            for taken in self.run.scheduler.in_flight.slices(microbatch.number)
        )

    def fail(self, number: int | None = None) -> None:
        super().fail(number)
        self.run.now_ns += RECOVERY_NS
        self.run.stages.free_at = [self.run.now_ns] * 3

    def until(self, lost_ns: float) -> bool:
        """Runs until a worker is lost for another reason; returns False if nothing is left to compute before."""
        while True:
            self.run.send_all()
            if not self.run.sent:
                return False
            if self.run.sent[0][0] >= lost_ns:
                self.run.now_ns = max(self.run.now_ns, int(lost_ns))
                self.fail()
                return True
            if not self.step():
                return False

    def lose_workers(self, count: int, *, is_regular: bool = False) -> None:
        """Loses workers `count` times, one a second on average, also during recoveries."""
        lost_ns: float = self.run.now_ns
        for _ in range(count):
            lost_ns += S_NS * (1.0 if is_regular else self.source.expovariate(1.0))
            if lost_ns > self.run.now_ns and not self.until(lost_ns):
                return


def requests(source: Random, count: int) -> list[GenerationRequest]:
    lengths = [source.randrange(1, 60) for _ in range(count)]
    prompts = [tuple(source.randrange(VOCABULARY) for _ in range(length)) for length in lengths]
    return [GenerationRequest(f"r{i}", prompt, 40, seed=i) for i, prompt in enumerate(prompts)]


def long_requests(lengths: Sequence[int], tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"r{i}", (i, *[1] * (length - 1)), tokens, seed=i, cache_salt=str(i))
        for i, length in enumerate(lengths)
    ]


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
    assert run.failures <= (MAX_STRIKES + 2) * poisoned, "other rows than before break it when it is computed again"
    for key, generation in zip(keys, generations, strict=True):
        answered = run.run.rows(key)
        wanted = expected(generation, settings.context_length)[0]
        assert answered == (wanted[:5] if generation.seed in seeds else wanted)


@pytest.mark.parametrize("number", range(8))
def test_failures_of_other_causes_end_no_request(number: int) -> None:
    """Failures may be frequent, because requests in flight are soon computed."""
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


def test_a_request_that_is_never_computed_between_losses_does_not_fail() -> None:
    """Other requests do not wait for the long one: every second epoch computes all of them."""
    run = Timed(Random(SEED))
    keys = [run.run.add(request) for request in long_requests([LONG, *[30] * 6], 100)]
    run.lose_workers(60, is_regular=True)
    assert run.failures == 60
    assert not run.failed
    assert not run.run.updates[keys[0]]
    assert min(len(run.run.rows(key)) for key in keys[1:]) > 20
    run.finish()
    assert not run.failed


@pytest.mark.parametrize("number", range(3))
def test_a_loss_each_second_ends_no_request(number: int) -> None:
    print(f"seed {SEED}, {number}")
    source = Random(f"{SEED} {number}")
    run = Timed(source)
    for request in long_requests([source.choice((20, 200, 1000, LONG)) for _ in range(24)], 400):
        run.run.add(request)
    run.lose_workers(30)
    assert not run.failed


@pytest.mark.parametrize("length", [20, 1000])
def test_a_poisoned_request_fails_soon_beside_others(length: int) -> None:
    run = Timed(Random(SEED), poisoned=frozenset([7]))
    begun_ns = run.run.now_ns
    keys = [run.run.add(request) for request in long_requests([length] * 33, 100)]
    while not run.failed and run.step():
        pass
    assert run.failed == [7]
    assert run.failures == MAX_STRIKES
    assert run.run.now_ns - begun_ns < 10 * S_NS + 4 * 33 * length * 400_000
    run.finish()
    assert run.failed == [7]
    assert len(run.run.rows(keys[0])) == 100


def test_a_poisoned_request_fails_alone_while_workers_are_lost_for_other_reasons() -> None:
    print(f"seed {SEED}")
    run = Timed(Random(SEED), poisoned=frozenset([7]))
    for request in long_requests([100] * 17, 400):
        run.run.add(request)
    run.lose_workers(80)
    assert run.failed == [7]


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
