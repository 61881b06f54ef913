"""Tests of owners of requests: one with many neither fills the queue nor delays others, and no token changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.sequence_choice import (
    RunningCounts,
    first_in_turn,
    startable,
    turn_victims,
)
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.core.errors import QueueFullError
from llamaclust.core.sampler.matchers import Grammar
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

CONTEXT = 400
BLOCKS = 1000


def scheduler(max_sequences: int, max_waiting: int) -> Scheduler:
    settings = SchedulerSettings("m", VOCABULARY, CONTEXT, BLOCKS, max_sequences=max_sequences, max_waiting=max_waiting)
    return Scheduler(settings, 1, 2)


def request(number: int, owner: str, tokens: int = 30, group: str = "", grammar: str = "") -> GenerationRequest:
    source = Random(f"{SEED} {owner} {number}")
    prompt = tuple(source.randrange(VOCABULARY) for _ in range(40))
    made = Grammar(grammar) if grammar else None
    return GenerationRequest(f"{owner}{number}", prompt, tokens, seed=number, group=group, owner=owner, grammar=made)


def begun(run: Simulation, requests: Iterable[GenerationRequest]) -> list[int]:
    """Adds requests, and returns their keys when each has a first result."""
    keys = [run.add(one) for one in requests]
    while not all(run.updates[key] for key in keys):
        run.step()
    return keys


def check(run: Simulation, keys: Iterable[int], requests: Iterable[GenerationRequest], context: int) -> None:
    """Checks that each answer is that of the request alone."""
    for key, one in zip(keys, requests, strict=True):
        assert run.rows(key) == expected(one, context)[0]


def added(to: Scheduler, owner: str, count: int) -> int:
    """Returns the number of accepted requests."""
    for number in range(count):
        try:
            to.add(request(number, owner), 0)
        except QueueFullError:
            return number
    return count


@pytest.mark.parametrize(("first", "room"), [(300, 24), (25, 24), (24, 24), (3, 24)])
def test_a_queue_that_one_fills_has_places_for_others(first: int, room: int) -> None:
    queue = scheduler(8, room - 8)
    assert added(queue, "a", first) == min(first, room), "alone it has all places"
    others = [added(queue, owner, 300) for owner in "bcde"]
    assert all(others), "each of the others finds some"
    assert len(queue.queues.waiting) <= 2 * room
    with pytest.raises(
        QueueFullError,
        match=r"^\d+ sequences of .* wait, and 1 more are too many: max_waiting is \d+, .*: try again later$",
    ):
        queue.add(request(999, "b"), 0)


@pytest.mark.parametrize("group", ["", "many choices"])
@pytest.mark.parametrize("others", [1, 3])
def test_many_requests_of_one_owner_do_not_keep_another_waiting(group: str, others: int) -> None:
    """The other owners' first tokens come before any further answer of the first ends; all tokens are as if alone."""
    print(f"seed {SEED}")
    fake = FakeStages(FakeModel(BLOCKS), [linear(100, 10)] * 2, 1000)
    run = Simulation(scheduler(8, 300), fake)
    many = [request(number, "a", 200, group) for number in range(60)]
    keys = [run.add(one) for one in many]
    for _ in range(20):
        run.step()
    later = [request(number, f"other {number}") for number in range(others)]
    later_keys = [run.add(one) for one in later]
    ended = sum(len(run.updates[key]) > 200 for key in keys)
    while not all(run.updates[key] for key in later_keys):
        run.step()
    assert sum(len(run.updates[key]) > 200 for key in keys) == ended
    assert run.scheduler.counts.preemptions <= others
    run.finish()
    for key, one in zip([*keys, *later_keys], [*many, *later], strict=True):
        assert run.rows(key) == expected(one, CONTEXT)[0]


@pytest.mark.parametrize(
    "beside",
    [{"window": 20, "window_blocks": 4 * 5 + 8}, {"has_states": True, "state_blocks": 6}],
    ids=["window", "states"],
)
def test_turns_are_given_where_window_or_state_blocks_are_short(beside: dict[str, Any]) -> None:
    """Places and ordinary KV blocks are free."""
    settings = SchedulerSettings("m", VOCABULARY, CONTEXT, BLOCKS, max_sequences=16, max_batch_tokens=128, **beside)
    run = Simulation(Scheduler(settings, 1, 2), FakeStages(FakeModel(BLOCKS), [linear(100, 10)] * 2, 1000))
    many = [request(number, "a", 300) for number in range(8)]
    keys = [run.add(one) for one in many]
    while len(run.updates[keys[0]]) < 100:
        run.step()
    later = request(0, "b")
    later_key = run.add(later)
    while not run.updates[later_key]:
        run.step()
    assert not any(len(run.updates[key]) > 300 for key in keys)
    assert run.scheduler.counts.preemptions == 1
    run.finish()
    for key, one in zip([*keys, later_key], [*many, later], strict=True):
        assert run.rows(key) == expected(one, CONTEXT)[0]


@pytest.mark.parametrize("beside", [{"window": 20, "window_blocks": 14 + 8}, {}], ids=["window", "blocks"])
def test_nothing_is_preempted_for_a_sequence_that_would_still_lack_room(beside: dict[str, Any]) -> None:
    """The oldest sequences of two owners leave no room for that of a third one, but for short ones."""
    blocks = BLOCKS if beside else 72
    settings = SchedulerSettings("m", VOCABULARY, 800, blocks, max_sequences=16, max_batch_tokens=128, **beside)
    run = Simulation(Scheduler(settings, 1, 2), FakeStages(FakeModel(blocks), [linear(100, 10)] * 2, 1000))
    source = Random(SEED)
    long = [
        replace(request(0, owner, 200), prompt=tuple(source.randrange(VOCABULARY) for _ in range(300)))
        for owner in "ac"
    ]
    long_keys = [run.add(one) for one in long]
    while not all(run.updates[key] for key in long_keys):
        run.step()
    third = replace(request(0, "b", 20), prompt=tuple(number * 7 % VOCABULARY for number in range(500)))
    third_key = run.add(third)
    short = [request(number, "a", 10) for number in range(1, 7)]
    short_keys = [run.add(one) for one in short]
    while not run.updates[third_key]:
        run.step()
    assert run.scheduler.counts.preemptions == 0
    run.finish()
    for key, one in zip([*long_keys, third_key, *short_keys], [*long, third, *short], strict=True):
        assert run.rows(key) == expected(one, 800)[0]


def test_no_choice_is_preempted_where_the_blocks_of_its_prompt_stay_in_use() -> None:
    settings = SchedulerSettings("m", VOCABULARY, 800, 50, max_sequences=16)
    run = Simulation(Scheduler(settings, 1, 1), FakeStages(FakeModel(50), [linear(100, 10)], 1000))
    source = Random(SEED)
    first, second = (tuple(source.randrange(VOCABULARY) for _ in range(length)) for length in (320, 450))
    choices = [replace(request(number, "a", 80, "choices"), prompt=first) for number in range(4)]
    keys = begun(run, choices)
    other = replace(request(0, "b", 20), prompt=second)
    keys.append(run.add(other))
    run.finish()
    assert run.scheduler.counts.preemptions == 0
    check(run, keys, [*choices, other], 800)


def test_nothing_is_preempted_for_a_sequence_that_has_room_by_now() -> None:
    """A sequence of the other owner ends in the step before, and its blocks suffice."""
    settings = SchedulerSettings("m", VOCABULARY, 800, 50, max_sequences=16)
    run = Simulation(Scheduler(settings, 1, 1), FakeStages(FakeModel(50), [linear(100, 10)], 1000))
    source = Random(SEED)
    first, second = (tuple(source.randrange(VOCABULARY) for _ in range(length)) for length in (450, 550))
    requests = [replace(request(0, "a", 30), prompt=first), *(request(number, "a", 90) for number in (1, 2))]
    keys = begun(run, requests)
    requests.append(replace(request(0, "b", 20), prompt=second))
    keys.append(run.add(requests[-1]))
    run.finish()
    assert run.scheduler.counts.preemptions == 0
    check(run, keys, requests, 800)


@pytest.mark.parametrize("lengths", [(500, 100), (100, 500), (500,), (100,)], ids=str)
@pytest.mark.parametrize(("blocks", "places"), [(280, 16), (310, 16), (1000, 5)])
def test_prompts_do_not_wait_for_a_long_prompt_of_another_owner(
    lengths: tuple[int, ...], blocks: int, places: int
) -> None:
    settings = SchedulerSettings("m", VOCABULARY, 4096, blocks, max_sequences=places, prefill_chunk=64)
    run = Simulation(Scheduler(settings, 1, 1), FakeStages(FakeModel(blocks), [linear(100, 10)], 1000))
    several = [request(number, "a", 300) for number in range(3)]
    keys = begun(run, several)
    long = replace(request(3, "a", 5), prompt=tuple(number * 7 % VOCABULARY for number in range(4000)))
    long_key = run.add(long)
    for _ in range(5):
        run.step()
    later = [
        replace(request(number, "b", 5), prompt=long.prompt[1 : 1 + length]) for number, length in enumerate(lengths)
    ]
    later_keys = [run.add(one) for one in later]
    while not all(run.updates[key] for key in later_keys):
        run.step()
    assert not run.updates[long_key]
    run.finish()
    for key, one in zip([*keys, long_key, *later_keys], [*several, long, *later], strict=True):
        assert run.rows(key) == expected(one, 4096)[0]


def test_an_owner_whose_requests_run_displaces_no_others() -> None:
    """The owner with more requests waits, although one of its requests alone would be due."""
    fake = FakeStages(FakeModel(BLOCKS), [linear(100, 10)] * 2, 1000)
    run = Simulation(scheduler(8, 300), fake)
    pair = [run.add(request(number, "b", 300, "pair")) for number in range(2)]
    for number in range(60):
        run.add(request(number, "a", 100))
    while not all(len(run.updates[key]) > 300 for key in pair):
        run.step()
    assert run.scheduler.counts.preemptions == 0


def test_a_request_takes_no_place_of_an_owner_with_as_many_sequences() -> None:
    run = Simulation(scheduler(4, 300), FakeStages(FakeModel(BLOCKS), [linear(100, 10)] * 2, 1000))
    requests = [request(0, "p", 60), request(1, "p", 90), *(request(number, "q", 90, "pair") for number in range(2))]
    keys = begun(run, requests)
    requests.append(request(2, "p"))
    keys.append(run.add(requests[-1]))
    run.finish()
    assert run.scheduler.counts.preemptions == 0
    check(run, keys, requests, CONTEXT)


def test_a_preempted_sequence_does_not_precede_the_one_that_took_its_place() -> None:
    print(f"seed {SEED}")
    source, turns = Random(SEED), 0
    for _ in range(2000):
        owners = [source.choice("pqr"[: source.randint(1, 3)]) for _ in range(source.randint(2, 12))]
        requests = [
            request(number, owner, group=f"{owner} {source.randrange(4)}") for number, owner in enumerate(owners)
        ]
        sequences = [Sequence(number, one, 10, Usage(0)) for number, one in enumerate(requests)]
        places = source.randrange(1, len(sequences))
        running, waiting = sequences[:places], sequences[places:]
        counts = RunningCounts.of(running)
        first = first_in_turn(waiting, counts)
        victims = turn_victims(first, running, counts)
        for count in range(1, len(victims) + 1):
            counts = RunningCounts.of(one for one in running if one not in victims[:count])
            assert all(counts.rank(first) < counts.rank(victim) for victim in victims[:count])
        turns += len(victims)
    assert turns > 100


@pytest.mark.parametrize("is_younger", [False, True])
def test_an_own_request_gives_its_place_however_old_others_are(is_younger: bool) -> None:
    run = Simulation(scheduler(6, 300), FakeStages(FakeModel(BLOCKS), [linear(100, 10)], 1000))
    groups = ["p", "q"] if is_younger else ["q", "p"]
    requests = [request(3 * at + number, of, 90, of) for at, of in enumerate(groups) for number in range(3)]
    keys = begun(run, requests)
    requests.append(request(9, "p"))
    keys.append(run.add(requests[-1]))
    run.finish()
    assert run.scheduler.counts.preemptions == 1
    check(run, keys, requests, CONTEXT)


def test_what_others_may_give_is_counted_once_and_nothing_is_preempted_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SchedulerSettings("m", VOCABULARY, 800, 82, max_sequences=16, prefix_cache=False)
    run = Simulation(Scheduler(settings, 1, 1), FakeStages(FakeModel(82), [linear(100, 10)], 1000))
    suffices = Mock(wraps=run.scheduler.queues.memory.suffices_without)
    monkeypatch.setattr(run.scheduler.queues.memory, "suffices_without", suffices)
    requests = [request(number, "p", 100) for number in range(2)]
    requests += [replace(request(number, "q", 50, "three"), prompt=(number,) * 200) for number in range(3)]
    keys = begun(run, requests)
    requests.append(replace(request(2, "p", 20), prompt=(7,) * 700))
    keys.append(run.add(requests[-1]))
    run.finish()
    assert run.scheduler.counts.preemptions == 0
    assert 0 < suffices.call_count < 10, "not once a step"
    check(run, keys, requests, 800)


@pytest.mark.parametrize("others", [1, 2, 3])
@pytest.mark.parametrize("group", ["", "choices"])
@pytest.mark.parametrize("blocks", [24, 30, 40])
def test_contexts_that_grow_displace_no_other_owner(others: int, group: str, blocks: int) -> None:
    """The owner with the most sequences gives up its own, even if another's are younger; all tokens are as if alone."""
    print(f"seed {SEED}")
    settings = SchedulerSettings("m", VOCABULARY, CONTEXT, blocks, max_sequences=8, max_waiting=300)
    run = Simulation(Scheduler(settings, 1, 2), FakeStages(FakeModel(blocks), [linear(100, 10)] * 2, 1000))
    many = [request(number, "a", 150, group) for number in range(6)]
    keys = [run.add(one) for one in many]
    for _ in range(20):
        run.step()
    later = [request(number, f"other {number}", 120) for number in range(others)]
    later_keys = [run.add(one) for one in later]
    preempted, preempt = list[tuple[str, int]](), run.scheduler.queues.preempt

    def noting(sequence: Sequence) -> None:
        owners = [other.request.owner for other in run.scheduler.queues.running]
        preempted.append((sequence.request.owner, owners.count("a")))
        preempt(sequence)

    run.scheduler.queues.preempt = noting  # type: ignore[method-assign]
    run.finish()
    assert preempted and not [owner for owner, most in preempted if owner != "a" and most > 1]
    for key, one in zip([*keys, *later_keys], [*many, *later], strict=True):
        assert run.rows(key) == expected(one, CONTEXT)[0]


@pytest.mark.parametrize(
    ("running", "free"),
    [
        ([], True),
        ([("a", Phase.PREFILL)], True),
        ([("a", Phase.PREFILL)] * 2, False),
        ([("a", Phase.PREFILL), ("a", Phase.DECODE)], True),
        ([("b", Phase.PREFILL)] * 5, True),
    ],
)
def test_few_matchers_of_large_grammars_are_awaited_for_an_owner(running: list[tuple[str, Phase]], free: bool) -> None:
    def sequence(owner: str, phase: Phase, grammar: str = "g" * 10_000) -> Sequence:
        made = Sequence(1, request(0, owner, grammar=grammar), 10, Usage(0))
        made.phase = phase
        return made

    runs = [sequence(owner, phase) for owner, phase in running]
    large, small, plain = (sequence("a", Phase.WAITING, grammar) for grammar in ("g" * 10_000, "g" * 100, ""))
    assert (large in startable([large, small, plain], runs)) is free
    assert {id(one) for one in startable([large, small, plain], runs)} >= {id(small), id(plain)}


def test_many_answers_of_a_large_grammar_run_to_their_ends() -> None:
    """Two at a time begin, and all of them end."""
    fake = FakeStages(FakeModel(BLOCKS), [linear(100, 10)] * 2, 1000)
    run = Simulation(scheduler(8, 300), fake)
    keys = [run.add(request(number, "a", 10, "n", "g" * 10_000)) for number in range(20)]
    while run.step():
        prefilling = [one for one in run.scheduler.queues.running if one.phase is Phase.PREFILL]
        assert len(prefilling) <= 2
    assert all(len(run.updates[key]) >= 10 for key in keys)


def test_a_turn_is_taken_when_a_transfer_no_longer_holds_blocks() -> None:
    settings = SchedulerSettings("m", VOCABULARY, 800, 40, max_sequences=16)
    run = Simulation(Scheduler(settings, 1, 1), FakeStages(FakeModel(40), [linear(100, 10)], 1000))
    source = Random(SEED)
    prompts = [tuple(source.randrange(VOCABULARY) for _ in range(length)) for length in (160, 160, 320)]
    requests = [replace(request(number, "aab"[number], 60), prompt=prompt) for number, prompt in enumerate(prompts)]
    keys = begun(run, requests[:2])
    queues = run.scheduler.queues
    transfer = queues.memory.transfers.begin_save(queues.running[1].kv.keys[:10], 0)
    assert transfer is not None
    keys.append(run.add(requests[2]))
    for _ in range(5):
        run.step()
    assert queues.preemptions == 0
    queues.memory.transfers.end(transfer)
    for _ in range(2):
        run.step()
    assert queues.preemptions == 1
    run.finish()
    check(run, keys, requests, 800)


def test_a_turn_is_taken_when_blocks_of_the_prompt_are_cached() -> None:
    settings = SchedulerSettings("m", VOCABULARY, 800, 60, max_sequences=3, prefill_chunk=64)
    run = Simulation(Scheduler(settings, 1, 1), FakeStages(FakeModel(60), [linear(100, 10)], 1000))
    source = Random(SEED)
    first, second = (tuple(source.randrange(VOCABULARY) for _ in range(length)) for length in (480, 240))
    requests = [request(number, "a", 90) for number in range(2)]
    requests += [replace(request(0, "c", 20), prompt=first), replace(request(0, "b", 20), prompt=first[:240] + second)]
    keys = begun(run, requests[:2])
    keys += [run.add(one) for one in requests[2:]]
    run.step()
    assert run.scheduler.queues.preemptions == 0
    run.finish()
    assert run.scheduler.queues.preemptions == 1
    check(run, keys, requests, 800)
