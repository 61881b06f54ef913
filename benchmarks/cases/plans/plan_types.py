from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from runner.case import Case, Group, Measures, option
from runner.in_process import prompts, run
from runner.models import model_of, types_of
from runner.options import chosen, positive
from runner.planned import NEAR, Shape, opened
from shape import LAYOUTS, SHAPES

from llamaclust.cluster.control.planning import ClusterPlanner, ClusterResources, predict_served
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.membership.worker_requests import profile_worker
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.control.profiles import ProfileWorker

_TOKENS, _PROMPT, _CONTEXT = 32, 512, 1024
_SHORT_PROMPT = 224  # With this length, attention reads as many keys as when a worker measures itself.
_KINDS = ("steps", "products", "limits")


@dataclass(frozen=True)
class PlanTypes(Case):
    """Compares predicted and measured times for every weight type, with models of one shape on one worker.
    The columns are the measured ms of a token and of a prompt of 512 tokens, and predicted / measured time for three
    predictions. `steps` predicts from the worker's measured steps, like a plan. `products` predicts from measured
    products, like a plan for a worker without the model file. `limits` predicts only from the worker's limits, like
    `plan --assume`. Each ratio uses the mean of predictions before and after a request."""

    rounds = 3
    types: tuple[QuantType, ...] = option(tuple(LAYOUTS), "types of weights, or all", types_of)
    shape: str = option("1.1b", "shape of the models", chosen("shape", {name: name for name in SHAPES}))
    folder: Path | None = option(None, "folder that already holds files such as Q4_K.gguf", Path)
    threads: int = option(2, "number of threads of the worker", positive)

    async def groups(self) -> AsyncIterator[Group]:
        goals = {f"{what} by {kind}": NEAR for what in ("token", "prompt") for kind in _KINDS}
        for quant_type in self.types:
            shape = Shape(quant_type.name.lower().replace("_", "-"), "", (self.threads,))
            with model_of(quant_type, self.shape, self.folder) as path:
                async with opened(shape, path, None, _CONTEXT) as cluster:
                    await _measured(cluster, random.Random(0))  # Warms up.
                    yield Group("", {quant_type.name: partial(self._measure, cluster)}, goals)

    async def _measure(self, cluster: Cluster, turn: int) -> Measures:
        before, taken = await _predicted(cluster), await _measured(cluster, random.Random(turn + 1))
        after = await _predicted(cluster)
        ratios = {
            f"{what} by {kind}": (before[kind][what] + after[kind][what]) / 2 / ms
            for what, ms in taken.items()
            for kind in _KINDS
        }
        return {**{f"{what} ms": ms for what, ms in taken.items()}, **ratios}


async def _predicted(cluster: Cluster) -> dict[str, dict[str, float]]:
    model, workers = cluster.model, cluster.registry.present
    types = tuple(map(int, model.quant_types))
    order = ProfileWorker(str(model.file.path), model.model_id, 0, types)
    known = {name: await profile_worker(worker, order) for name, worker in workers.items()}
    products = {name: profile.map(DeviceProfile.without_steps) for name, profile in known.items()}
    limits = {name: profile.map(_limits) for name, profile in products.items()}
    return {kind: _times(cluster, each) for kind, each in zip(_KINDS, (known, products, limits), strict=True)}


def _limits(profile: DeviceProfile) -> DeviceProfile:
    return replace(profile, products=(), isolated_products=())


def _times(cluster: Cluster, profiles: Mapping[str, Profile]) -> dict[str, float]:
    workers = {name: WorkerResources.of(worker) for name, worker in cluster.registry.present.items()}
    planner = cluster.supervisor.planner
    assert isinstance(planner, ClusterPlanner)
    found = predict_served(
        cluster.config, cluster.model, ClusterResources(workers, profiles, planner.links), cluster.plan
    )
    assert found is not None and cluster.plan.prompt_tokens == _PROMPT
    return {"token": 1e3 * found.token_s, "prompt": 1e3 * found.ttft_s}


async def _measured(cluster: Cluster, source: random.Random) -> dict[str, float]:
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    finished = await run(cluster, prompts(source, 1, _PROMPT, vocabulary)[0], 1)
    prompt = prompts(source, 1, _SHORT_PROMPT, vocabulary)[0]
    request = GenerationRequest("benchmark", prompt, _TOKENS, min_tokens=_TOKENS, max_drafted=0)
    events = cluster.engine.submit(request)
    at_s = [time.perf_counter() async for event in events if isinstance(event, TokenSampled)]
    return {"token": 1e3 * median(b - a for a, b in pairwise(at_s)), "prompt": finished.timings.ttft_ms}
