"""Seconds of stages on a worker, by start and end: what the search for splits weighs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from llamaclust.cluster.planner.costs import Flags, Table, WorkerFacts
from llamaclust.cluster.planner.links import Link
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.plan import usual_prompt_tokens

ANSWER_TOKENS: Final = 128
TOGETHER: Final = 8
"""The mix of work: for each of so many concurrent sequences, a usual prompt and that many tokens of an answer."""

_STAGE_S = 1e-9
"""Decides between splits that take as long."""

_ExpertTable = Callable[[WorkerFacts, Flags], Table]


def stage_tables(sizes: MemoryModel, contexts: int, worker: WorkerFacts) -> tuple[Table, Table]:
    """(seconds of the mix of work where the stage fits, seconds of one token) of each stage on a worker."""
    stages, prompt_tokens = sizes.stages, usual_prompt_tokens(sizes.request.context_length)
    answers = ANSWER_TOKENS / TOGETHER
    division = sizes.division(worker, contexts)

    def over(table: Callable[[WorkerFacts], Table], experts: _ExpertTable, exchange: Callable[[Flags], Table]) -> Table:
        if not worker.gpus:
            return table(worker)
        return division.sums(table) + division.moved(experts, exchange)

    def mix_of(*, concurrent: bool) -> Table:
        prefill, decode = (
            partial(stages.prefill_table, rows=prompt_tokens),
            partial(stages.decode_table, rows=TOGETHER),
        )
        return over(
            lambda device: prefill(device, concurrent=concurrent) + decode(device, concurrent=concurrent) * answers,
            lambda device, layers: (
                stages.experts_table(device, prompt_tokens, layers, concurrent=concurrent)
                + stages.experts_table(device, TOGETHER, layers, concurrent=concurrent) * answers
            ),
            lambda layers: (
                stages.exchange_table(prompt_tokens, layers) + stages.exchange_table(TOGETHER, layers) * answers
            ),
        )

    token = over(
        stages.decode_table,
        lambda device, layers: stages.experts_table(device, 1, layers),
        partial(stages.exchange_table, 1),
    )
    mix = mix_of(concurrent=True)
    mix[0, stages.layers] = mix_of(concurrent=False)[0, stages.layers]  # no other stage computes then
    fits = (sizes.shortfall_table(worker, contexts) == 0) & stages.possible
    sent_s, hops_s = link_tables(sizes, worker.reach)
    return np.where(fits, np.maximum(mix, sent_s), np.inf), token + hops_s + _STAGE_S


def link_tables(sizes: MemoryModel, reach: Link) -> tuple[Table, Table]:
    """(seconds that a prompt's rows travel, in and out while the stage computes; seconds of a token's hops), of each
    stage of a worker or leader with such links."""
    stages = sizes.stages
    crossing = usual_prompt_tokens(sizes.request.context_length) * stages.border_bytes
    others = np.ones(stages.held_bytes.shape)
    others[0, stages.layers] = 0  # a stage of all layers has no links
    sent_s = others * reach.byte_s * (crossing[:, np.newaxis] + crossing)
    row_bytes = stages.border_bytes.copy()
    row_bytes[[0, -1]] = 0  # a token id comes back from the last stage to the first one
    return sent_s, others * (2 * reach.one_way_s + reach.byte_s * (row_bytes[:, np.newaxis] + row_bytes))
