"""Tests of a request of many prompts and a later request, which does not wait for all of them; no token changes."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from llamaclust.cluster.scheduler.kv.prefix_cache import PrefixCache
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

CONTEXT = 400


def simulation(kv_blocks: int, max_sequences: int = 8, stages: int = 2, hop_ns: int = 1000) -> Simulation:
    settings = SchedulerSettings("m", VOCABULARY, CONTEXT, kv_blocks, max_sequences=max_sequences)
    fake = FakeStages(FakeModel(kv_blocks), [linear(100, 10)] * stages, hop_ns)
    return Simulation(Scheduler(settings, 1, stages), fake)


def request(source: Random, number: int, group: str, tokens: int = 100, length: int = 60) -> GenerationRequest:
    prompt = tuple(source.randrange(VOCABULARY) for _ in range(length))
    return GenerationRequest(f"{group}-{number}", prompt, tokens, seed=number, group=group)


@pytest.mark.parametrize("kv_blocks", [100, 1000])
@pytest.mark.parametrize("at", [1, 40])
@pytest.mark.parametrize(("stages", "hop_ns"), [(1, 1000), (1, 50_000), (2, 1000)])
def test_a_request_of_many_prompts_does_not_starve_another(kv_blocks: int, at: int, stages: int, hop_ns: int) -> None:
    print(f"seed {SEED}")
    source = Random(SEED)
    run = simulation(kv_blocks, stages=stages, hop_ns=hop_ns)
    prompts = [request(source, number, "many", tokens=300) for number in range(64)]
    keys = [run.add(prompt) for prompt in prompts]
    for _ in range(at):
        run.step()
    later = [request(source, number, f"later {number}", tokens=20) for number in range(2)]
    later_keys = [run.add(one) for one in later]
    came_ns = run.now_ns
    while not all(run.updates[key] for key in later_keys):
        run.step()
    waited_ms = (run.now_ns - came_ns) / 1e6
    assert waited_ms < 20, "80 until the first one ends, 640 until all have"
    assert run.scheduler.counts.preemptions < 10 or kv_blocks < 1000
    run.finish()
    for key, one in zip([*keys, *later_keys], [*prompts, *later], strict=True):
        assert run.rows(key) == expected(one, CONTEXT)[0]


def test_requests_of_one_prompt_each_run_in_order_of_arrival() -> None:
    source = Random(SEED)
    run = simulation(1000)
    keys = [run.add(request(source, number, f"r{number}", tokens=10)) for number in range(40)]
    began: list[int] = []
    while run.step():
        began += [key for key in keys if run.updates[key] and key not in began]
    assert run.scheduler.counts.preemptions == 0
    assert began == sorted(began) and set(began) == set(keys)


def test_a_turn_does_not_wait_for_blocks_that_are_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence without memory is looked up again only when some may be free."""
    source = Random(SEED)
    run = simulation(16)
    for number in range(3):
        run.add(request(source, number, "g", length=150))
    looked: list[object] = []
    find = PrefixCache.find

    def counted(cache: PrefixCache, *arguments: Any) -> tuple[int, int]:
        looked.append(cache)
        return find(cache, *arguments)

    monkeypatch.setattr(PrefixCache, "find", counted)
    for _ in range(60):
        run.step()
    assert run.scheduler.counts.waiting == 2 and len(looked) <= 3


def held_up(shorts: int) -> tuple[Simulation, int, int, list[int], list[GenerationRequest]]:
    """Returns a simulation of a running sequence, a long one that does not fit beside it, and short ones behind that:
    (run, running, long, short keys, all requests)."""
    source = Random(SEED)
    run = simulation(30)
    requests = [request(source, 0, "running", tokens=300)]
    running = run.add(requests[0])
    run.step()
    requests.append(request(source, 0, "long", tokens=5, length=395))
    requests += [request(source, number, f"short {number}", tokens=5, length=20) for number in range(shorts)]
    long, *short = [run.add(waiting) for waiting in requests[1:]]
    return run, running, long, short, requests


def test_shorter_ones_start_where_the_first_one_does_not_fit() -> None:
    run, running, long, short, requests = held_up(10)
    while len(run.rows(running)) < 200:
        run.step()
    assert not run.updates[long] and all(len(run.rows(key)) == 5 for key in short)
    run.finish()
    for key, one in zip([running, long, *short], requests, strict=True):
        assert run.rows(key) == expected(one, CONTEXT)[0]


def test_the_first_one_is_overtaken_a_bounded_number_of_times() -> None:
    run, _, long, short, _ = held_up(60)
    (waiting,) = (sequence for sequence in run.scheduler.sequences if sequence.key == long)
    while not waiting.is_begun:
        run.step()
    assert waiting.overtaken == 32 >= sum(bool(run.updates[key]) for key in short)
    run.finish()
