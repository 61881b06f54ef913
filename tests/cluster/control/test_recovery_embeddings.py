"""Tests of workers that are killed while prompts are embedded: hidden states have the bits of an undisturbed run."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path
from random import Random

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Recovering, config, recovering, undisturbed
from support.seed import SEED

PROMPT = 400


def present(run: Recovering, name: str) -> bool:
    return name in run.cluster.registry.present


def has_recovered(run: Recovering, count: int) -> bool:
    return run.cluster.supervisor.recoveries >= count


def is_told(run: Recovering, words: str) -> bool:
    return any(words in text for text in run.told)


async def test_any_worker_is_lost_while_prompts_are_embedded(model: Path, tmp_path: Path) -> None:
    source = Random(SEED)
    requests = tuple(
        GenerationRequest(f"e{i}", tuple(source.randrange(3, 320) for _ in range(PROMPT)), 0, embedded=(0, PROMPT))
        for i in range(6)
    )
    expected = await asyncio.to_thread(undisturbed, model, requests)
    async with recovering(config(model, tmp_path)) as run:
        for count, victim in enumerate("ac", 1):
            tasks = run.start(requests)
            await run.at_work()
            run.hurt(victim, signal.SIGKILL)
            assert await asyncio.gather(*tasks) == expected
            await run.until("the loss", partial(is_told, run, f"worker {victim} (layers"))
            await run.until("a recovery", partial(has_recovered, run, count))
            await run.until(f"worker {victim} again", partial(present, run, victim))
