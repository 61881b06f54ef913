"""Tests of drafts for sequences with states: accepted rows are computed again behind a refused one."""

from __future__ import annotations

import random

import pytest

from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from support.clusters.fakes import VOCABULARY, Simulation
from support.plans.drafting import SaidDrafters, replayed
from support.plans.simulations import check_answer, generation, simulation
from support.seed import SEED

LENGTH = 600


def with_states(drafters: SaidDrafters | None) -> Simulation:
    speculation = None if drafters is None else SpeculationSettings(drafters)
    return simulation(
        1, 1000, 5, speculation=speculation, context_length=LENGTH + 16, kv_blocks=64, max_batch_tokens=64,
        max_outputs=64, has_states=True, state_blocks=8, state_span=1024,
    )  # fmt: skip


@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.95])
def test_refused_windows_do_not_add_rows_to_all_later_ones(acceptance: float) -> None:
    request = generation(8, LENGTH)
    plain = with_states(None)
    key = plain.add(request)
    plain.finish()
    text = [*request.prompt, *(row.token for row in plain.rows(key))]
    run = with_states(SaidDrafters(replayed([text], acceptance, random.Random(SEED), VOCABULARY)))
    key = run.add(request)
    run.finish()
    check_answer(run, key, request)
    rows = [each.microbatch.rows for each in run.microbatches]
    assert max(rows) <= 2 * MAX_WINDOW, "as many as the stages have room for"
    assert len(rows) < len(plain.microbatches) - 20
