"""Checks that drafted rows change no token, whatever is drafted, and take no memory that others need."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.speculation import speculation as module
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from support.clusters.fakes import VOCABULARY, Simulation, expected
from support.plans.drafting import AnyChains, AnyWindows, SaidDrafters, Says, nonsense, replayed
from support.plans.simulations import check_answer, check_writes, generation, random_request, simulation


def speculating(says: Says, most: int = MAX_WINDOW, **changes: object) -> Simulation:
    return simulation(speculation=SpeculationSettings(SaidDrafters(says), most), **changes)  # type: ignore[arg-type]


def texts(requests: Sequence[GenerationRequest], context: int = 200) -> list[list[int]]:
    """Returns the tokens of each prompt and its answer."""
    return [[*each.prompt, *(row.token for row in expected(each, context)[0])] for each in requests]


def drafted_rows(run: Simulation) -> int:
    return sum(chunk.outputs - 1 for each in run.microbatches for chunk in each.microbatch.chunks if chunk.outputs > 1)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_drafted_rows_change_no_token_and_leak_nothing(seed: int) -> None:
    random_ = random.Random(seed)
    requests = [random_request(random_) for _ in range(random_.randint(1, 10))]
    says = replayed(texts(requests), random_.choice([0.0, 0.5, 0.9, 1.0]), random_, VOCABULARY)
    if random_.random() < 0.2:
        says = nonsense(random_, VOCABULARY)
    run = speculating(
        says,
        random_.choice([1, 2, 5, 32]),
        stages=random_.randint(1, 4),
        fixed_us=random_.choice([0, 100, 1000]),
        row_us=random_.choice([1, 10, 500]),
        hop_us=random_.choice([0, 1, 50, 1000]),
        prefill_chunk=random_.choice([None, None, 1, 5, 16, 100]),
        kv_blocks=random_.randint(13, 40),
        max_sequences=random_.choice([1, 1, 2, 5, 8]),
        max_outputs=random_.randint(8, 48),
        prefix_cache=random_.random() < 0.8,
    )
    check_writes(run)
    keys: dict[int, GenerationRequest] = {}
    with pytest.MonkeyPatch.context() as patch:
        if random_.random() < 0.8:
            patch.setattr(module, "best_windows", AnyWindows(random_, 32))
            patch.setattr(module, "best_chain", AnyChains(random_, random_.choice([1, 3, 16])))
        for request in requests:
            keys[run.add(request)] = request
            for _ in range(random_.choice([0, 0, 1, 5, 20])):
                run.step()
            if random_.random() < 0.15 and run.scheduler.abort(victim := random_.choice(list(keys))) is not None:
                del keys[victim]
        run.finish()
    for key, request in keys.items():
        check_answer(run, key, request)
    counts = run.scheduler.counts
    assert (counts.kv_blocks_held, counts.running, counts.waiting, counts.in_flight) == (0, 0, 0, 0)
    assert run.scheduler.queues.memory.blocks.available == counts.kv_blocks


@pytest.mark.parametrize("most", [3, 9])
def test_windows_behind_each_other_are_as_long_as_requests_allow(most: int) -> None:
    request = generation(20, 90, max_drafted=most)
    run = speculating(replayed(texts([request]), 1.0, random.Random(1), VOCABULARY), hop_us=20_000)
    key = run.add(request)
    run.finish()
    check_answer(run, key, request)
    decode = [each.microbatch.chunks[0] for each in run.microbatches[1:]]
    assert max(chunk.outputs for chunk in decode) <= 1 + most
    assert sum(chunk.outputs > 1 for chunk in decode) > 3
    assert run.scheduler.drafts.drafted >= run.scheduler.drafts.accepted > 60
