"""Schedulers on fake stages, requests for them, and checks of their answers and writes."""

from __future__ import annotations

import random
from dataclasses import replace

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampler.params import SamplerChain, SamplerName, SamplingParams
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, blocks_of, expected, linear, reason_of

BASE = SchedulerSettings(
    model_id="m",
    vocabulary=VOCABULARY,
    context_length=200,
    kv_blocks=64,
    max_sequences=8,
    max_batch_tokens=128,
    max_outputs=32,
)
MIROSTAT = SamplingParams(chain=SamplerChain(mirostat=1))
DRY = SamplingParams(chain=SamplerChain((SamplerName.DRY,), dry_multiplier=1.0))


def simulation(
    stages: int = 2, fixed_us: float = 100, row_us: float = 10, hop_us: float = 1, **changes: object
) -> Simulation:
    chosen = replace(BASE, **changes)  # type: ignore[arg-type]
    fake = FakeStages(FakeModel(chosen.kv_blocks), [linear(fixed_us, row_us)] * stages, round(hop_us * 1000))
    return Simulation(Scheduler(chosen, epoch=1, stages=stages), fake)


def generation(length: int, max_new_tokens: int, start: int = 1, **fields: object) -> GenerationRequest:
    prompt = tuple((start + 7 * i) % VOCABULARY for i in range(length))
    return GenerationRequest("r", prompt, max_new_tokens, **fields)  # type: ignore[arg-type]


def check_answer(run: Simulation, key: int, request: GenerationRequest) -> None:
    chosen, scored, reason = expected(request, run.scheduler.settings.max_sequence_tokens)
    assert run.rows(key) == chosen
    assert run.scores(key) == scored
    assert reason_of(run.updates[key]) is reason


def check_writes(run: Simulation) -> None:
    """Makes the run assert that no microbatch writes a block of another table, or one block for two sequences."""

    def check(scheduled: ScheduledMicrobatch) -> None:
        written: list[int] = []
        for chunk in scheduled.microbatch.chunks:
            table = blocks_of(chunk)
            end = chunk.position + len(chunk.tokens)
            written += table[chunk.position // KV_BLOCK_TOKENS : (end - 1) // KV_BLOCK_TOKENS + 1]
        assert len(set(written)) == len(written), "two sequences write one block"
        assert all(run.scheduler.queues.memory.blocks.holders(block) == 1 for block in written), (
            "a shared block is written"
        )

    run.check = check


def random_request(random_: random.Random) -> GenerationRequest:
    max_new_tokens = random_.choice([0, 1, 3, 30, 90])
    return generation(
        random_.choice([2, 3, 15, 16, 17, 31, 48, 90, 150]),
        max_new_tokens,
        start=random_.randint(0, 2),
        seed=random_.randint(0, 3),
        score_from=random_.choice([None, 0, 5, 20, 60]) if max_new_tokens else random_.choice([0, 1]),
        stop_token_ids=frozenset(random_.sample(range(VOCABULARY), random_.choice([0, 3]))),
        late_token_ids=frozenset(random_.sample(range(VOCABULARY), random_.choice([0, 3]))),
        min_tokens=random_.choice([0, 0, 4]),
        params=random_.choice([SamplingParams(), SamplingParams(repetition_penalty=1.1), MIROSTAT, DRY]),
        penalty_window=random_.choice([3, 64]),
        dry_window=random_.choice([0, 9, 200]),
        breakers={5: ((5,), (5, 6)), 40: ((40, 41, 42),)},
    )
