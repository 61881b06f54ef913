from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner.case import Case, Group, Measures, argument, option
from runner.in_process import prompts, run
from runner.options import existing, positive
from runner.planned import NEAR, PROMPT, TOKENS, Shape, Times, at, compared, network, opened

from llamaclust.cluster.server.coordinator import Cluster
from llamaclust.core.sizes import MIB
from llamaclust.model.gguf.model_file import open_model
from support.network.box import Box, missing

_CONTEXT, _LONG_PROMPT = 1024, 512
_OWN_MIB = 700  # Memory of a worker in addition to weights.


@dataclass(frozen=True)
class PlanExperts(Case):
    r"""Compares predicted and measured times of a mixture of experts on three workers, in decode and prefill.

        python benchmarks/shape.py 7b Q4_K moe.gguf --alike --hidden 2048 --layers 40 --heads 32 --kv-heads 4 \
            --ffn 768 --experts 128 --experts-used 8

    This command makes a model of 13 GB. Each of three workers has one thread, and memory for less than half of the
    model. With --hosts, each worker has its own host (a network namespace, which needs root) with links of 1 Gbit/s and
    a round trip of 1 ms."""

    rounds = 3
    model: Path = argument("path of a .gguf", existing)
    hosts: bool = option(False, "run each worker on its own host (network namespace)")
    memory: int | None = option(None, "MiB of memory per worker (default: 0.40 of the model)", positive)

    async def groups(self) -> AsyncIterator[Group]:
        if self.hosts and (reason := missing()) is not None:
            print(f"not measured: {reason}")
            return
        memory = self.memory or int(0.40 * open_model(self.model).size_bytes / MIB) + _OWN_MIB
        links = (at(0.5, 1000),) * 3 if self.hosts else ()
        shape = Shape("experts", "three hosts" if self.hosts else "three processes", (1,) * 3, (memory,) * 3, links)
        with network(shape) as box:
            goals = {"token ratio": NEAR, "prompt ratio": NEAR}
            yield Group("", {shape.what: partial(self._measure, shape, box)}, goals)

    async def _measure(self, shape: Shape, box: Box | None, turn: int) -> Measures:
        return await compared(partial(opened, shape, self.model, box, _CONTEXT), partial(_times, random.Random(turn)))


async def _times(source: random.Random, cluster: Cluster) -> Times:
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    assert cluster.plan.prompt_tokens == _LONG_PROMPT
    decoded = await run(cluster, prompts(source, 1, PROMPT, vocabulary)[0], TOKENS)
    begun_s = time.perf_counter()
    await run(cluster, prompts(source, 1, _LONG_PROMPT, vocabulary)[0], 1)
    return {"token": 1e3 / decoded.timings.decode_tok_s, "prompt": 1e3 * (time.perf_counter() - begun_s)}
