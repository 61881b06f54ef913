from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner.case import Case, Group, Measures, argument, option
from runner.in_process import prompts, run
from runner.options import chosen, existing, listed
from runner.planned import NEAR, PROMPT, TOKENS, Shape, Times, at, compared, network, opened

from llamaclust.cluster.server.coordinator import Cluster
from support.network.box import Box, missing

_TOGETHER = 8
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("one", "small, one worker of one thread", (1,), is_small=True),
        Shape("two", "small, two alike, throughput", (1, 1), objective="throughput", is_small=True),
        Shape("threads", "small, one and two threads, throughput", (2, 1), objective="throughput", is_small=True),
        Shape("large", "large, one worker of two threads", (2,)),
        Shape("large-two", "large, two alike, memory for less than all on each", (1, 1), (740, 740)),
        Shape("uneven", "large, memory for a third on one of two", (1, 1), (740, 460)),
        Shape("three", "large, memory for less than half on each", (1, 1, 1), (430,) * 3),
        Shape("large-both", "large, two alike, throughput", (1, 1), objective="throughput"),
        Shape("near", "large, two hosts, round trip 0.5 ms", (1, 1), (740, 740), (at(0.5), at(0.5))),
        Shape("far", "large, one host 5 ms away", (1, 1), (740, 740), (at(0.5), at(5))),
        Shape(
            "mixed", "large, hosts 1, 4 ms, 20 ms at 50 Mbit/s away", (1,) * 3, (430,) * 3, (at(1), at(4), at(20, 50))
        ),
    )
}


@dataclass(frozen=True)
class Plan(Case):
    """Compares predicted and measured times of a token in eleven kinds of clusters.
    SMALL is the demo model. LARGE has about a gigabyte (`benchmarks/shape.py 1.1b Q4_K`). Each cluster starts without
    earlier measurements. `ratio` is predicted / measured time. With the objective `throughput`, the time is per token
    of eight simultaneous requests. Clusters with links need root, for network namespaces."""

    rounds = 3
    small: Path = argument("path of a small model (.gguf)", existing)
    large: Path = argument("path of a large model (.gguf)", existing)
    shapes: tuple[Shape, ...] = option(tuple(SHAPES.values()), "kinds of clusters", listed(chosen("shape", SHAPES)))

    async def groups(self) -> AsyncIterator[Group]:
        for shape in self.shapes:
            if shape.links and (reason := missing()) is not None:
                print(f"{shape.name} not measured: {reason}", flush=True)
            elif shape.links and len(self.shapes) > 1:
                script = str(Path(__file__).parents[2] / "run.py")
                words = (sys.executable, script, "plan", str(self.small), str(self.large), "--shapes", shape.name)
                await asyncio.to_thread(subprocess.run, words, check=True)
            else:
                with network(shape) as box:
                    measured = {shape.what: partial(self._measure, shape, box)}
                    yield Group("", measured, {"token ratio": NEAR})

    async def _measure(self, shape: Shape, box: Box | None, turn: int) -> Measures:
        model = self.small if shape.is_small else self.large
        return await compared(
            partial(opened, shape, model, box), partial(_times, random.Random(f"{shape.name} {turn}"))
        )


async def _times(source: random.Random, cluster: Cluster) -> Times:
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    if cluster.config.objective == "latency":
        finished = await run(cluster, prompts(source, 1, PROMPT, vocabulary)[0], TOKENS)
        return {"token": 1e3 / finished.timings.decode_tok_s}
    requested = prompts(source, _TOGETHER, 1, vocabulary)
    begun_s = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, 2 * TOKENS) for prompt in requested))
    return {"token": (time.perf_counter() - begun_s) * 1e3 / (_TOGETHER * 2 * TOKENS)}
