"""Tests MTP heads in the scheduler: their gains on a simulated clock, and that no draft changes a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.drafting.drafter import LONG, MTP, Draft
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation as module
from llamaclust.cluster.scheduler.speculation.acceptance import Acceptance
from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.mtp_drafts import MtpDrafts
from llamaclust.cluster.scheduler.speculation.mtp_times import MtpTimes
from llamaclust.cluster.scheduler.speculation.mtp_use import MtpUse
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from support.clusters.fakes import VOCABULARY, ConstantModel, Simulation, StageNs, linear
from support.plans.drafting import AnyWindows, SaidDrafters
from support.plans.mtp import AnyLengths, MtpStages
from support.plans.simulations import check_answer, check_writes, random_request, simulation

PROMPT, TOKENS = 64, 600
SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=4096, kv_blocks=4096, prefix_cache=False)
SILENT = SaidDrafters(lambda tokens, most: ())
USING = SpeculationSettings(SILENT, mtp=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_heads_draft_changes_no_token_and_leaks_nothing(seed: int) -> None:
    source = random.Random(seed)
    requests = [random_request(source) for _ in range(source.randint(1, 10))]
    run = simulation(
        speculation=SpeculationSettings(SILENT, source.choice([1, 2, 5, 32]), mtp=True),
        stages=source.randint(1, 4),
        fixed_us=source.choice([0, 100, 1000]),
        row_us=source.choice([1, 10, 500]),
        hop_us=source.choice([0, 1, 50, 1000]),
        prefill_chunk=source.choice([None, None, 1, 5, 16, 100]),
        kv_blocks=source.randint(13, 40),
        max_sequences=source.choice([1, 1, 2, 5, 8]),
        max_outputs=source.randint(8, 48),
        prefix_cache=source.random() < 0.8,
    )

    def says(position: int, most: int) -> tuple[int, ...]:
        """Drafts valid and invalid tokens, none, or too many."""
        return tuple(source.randint(-1, VOCABULARY) for _ in range(source.choice([0, 1, most, most, most + 1])))

    stages = run.stages
    run.stages = MtpStages(stages.model, stages.stage_ns, stages.hop_ns, says=says, draft_ns=source.choice([0, 9_000]))
    check_writes(run)
    keys: dict[int, GenerationRequest] = {}
    with pytest.MonkeyPatch.context() as patch:
        if source.random() < 0.8:
            patch.setattr(module, "best_windows", AnyWindows(source, 32))
            patch.setattr(MtpDrafts, "length", AnyLengths(source, 8).length)
        for request in requests:
            keys[run.add(request)] = request
            for _ in range(source.randint(0, 12)):
                run.step()
        run.finish()
    for key, request in keys.items():
        check_answer(run, key, request)
    assert run.scheduler.counts.kv_blocks_held == 0


def _ms_of(
    right: float | None, stage_ns: Sequence[StageNs], draft_us: float, sequences: int = 1, hop_us: float = 100.0
) -> tuple[float, MtpStages]:
    """Returns the milliseconds of TOKENS tokens of each sequence after the prompts, and the stages; `right` is the
    probability of each drafted token."""
    source = random.Random(5)  # fixed, because gains vary by chance

    def says(position: int, most: int) -> tuple[int, ...]:
        assert right is not None, "no head was loaded"
        return tuple(1 if source.random() < right else 2 for _ in range(most))

    own = None if right is None else USING
    stages = MtpStages(ConstantModel(4096), stage_ns, round(hop_us * 1e3), says=says, draft_ns=round(draft_us * 1e3))
    run = Simulation(Scheduler(replace(SETTINGS, speculation=own), 1, len(stage_ns)), stages)
    keys = [run.add(GenerationRequest("r", (index,) * PROMPT, TOKENS)) for index in range(sequences)]
    while not all(run.rows(key) for key in keys):
        run.step()
    begun = run.now_ns
    run.finish()
    assert all([row.token for row in run.rows(key)] == [1] * TOKENS for key in keys)
    return (run.now_ns - begun) / 1e6, stages


CURVES = {"bound by memory": [linear(4000, 50)], "two stages": [linear(2000, 100)] * 2}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("right", "least"), [(1.0, 2.5), (0.8, 1.7), (0.6, 1.25)])
def test_a_head_that_is_right_gains(curve: str, right: float, least: float) -> None:
    plain_ms, _ = _ms_of(None, CURVES[curve], 0)
    drafted_ms, _ = _ms_of(right, CURVES[curve], 200)
    assert plain_ms / drafted_ms >= least, f"{plain_ms / drafted_ms:.2f}"


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("right", "draft_us"), [(0.0, 200), (0.1, 200), (0.5, 8000)])
@pytest.mark.parametrize("sequences", [1, 8])
def test_a_head_that_does_not_pay_costs_little(curve: str, right: float, draft_us: float, sequences: int) -> None:
    plain_ms, _ = _ms_of(None, CURVES[curve], 0, sequences)
    drafted_ms, stages = _ms_of(right, CURVES[curve], draft_us, sequences)
    assert plain_ms / drafted_ms >= 0.95, f"{plain_ms / drafted_ms:.3f}, asked for {stages.asked}"
    assert stages.asked < TOKENS // 5


def test_a_head_that_gets_better_is_noticed() -> None:
    use = MtpUse()
    asked = []
    for tokens in range(PROMPT, 5000):
        if use.is_due(tokens):
            use.order(tokens, 1)
            asked.append(tokens)
    assert asked[0] == PROMPT and 15 < len(asked) < 60
    pauses = [later - earlier for earlier, later in pairwise(asked) if later - earlier > 1]
    assert pauses == sorted(pauses) and pauses[-1] == 1024
    while use.is_due(asked[-1] + 1):
        use.order(asked[-1] + 1, 1)
    use.order(asked[-1] + 1, 1)  # not due: its drafts pay now
    assert not use.is_due(asked[-1] + 64) and use.is_due(asked[-1] + 65)


def test_times_are_those_of_the_nearest_number_of_sequences() -> None:
    times = MtpTimes()
    assert times.draft_ns(1, 3) is None
    times.learn(1, 2, 2000)
    times.learn(8, 1, 5000)
    assert times.draft_ns(2, 3) == 3000
    assert times.draft_ns(6, 1) == 5000
    times.learn(1, 1, 10**9)  # the process was paused
    assert 1000 < (times.draft_ns(1, 1) or 0) < 2000


class _Says:
    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        return self._draft


def test_the_draft_that_promises_more_counts() -> None:
    def chosen(other: Draft, suggested: tuple[int, ...]) -> tuple[int, ...]:
        drafts = SequenceDrafts(_Says(other), VOCABULARY, [Acceptance() for _ in range(MTP + 1)])
        drafts.suggest([1, 2, 3], suggested)
        assert drafts.is_of_mtp == (other.tokens != drafts.next([1, 2, 3], 8).tokens)
        return drafts.next([1, 2, 3], 8).tokens

    assert chosen(Draft((5,) * 8, LONG + 1), (6, 7)) == (5,) * 8
    assert chosen(Draft((5,), LONG), (6, 7, 8)) == (6, 7, 8)
    assert chosen(Draft((), 0), (6, -1, 8)) == (6,)
    assert chosen(Draft((5,), 1), ()) == (5,)
