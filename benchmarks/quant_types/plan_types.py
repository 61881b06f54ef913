"""Accuracy of plans for every quant type: predicted and measured times of one shape on one worker.

    python benchmarks/quant_types/plan_types.py [--types Q4_K,IQ1_S] [--shape 1.1b] [--threads 2] [--repeats 3]
    python benchmarks/quant_types/plan_types.py --table plans.jsonl

For each type a file is written and a cluster started. A line has the measured ms of a token and of a prompt of 512
tokens, and predicted / measured: of the plan, by steps of the model that the worker measured; by products alone (a
worker without the model file); and by its limits alone, as `plan --assume` predicts. The worker measures itself before
and after each measured request, and the mean of both predictions counts; printed are medians. 20 seconds a type, longer
for large files. `--table` prints a file of `--json` as a table in Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring.answers import prompts, run
from measuring.options import chosen, listed, positive
from measuring.plan_shapes import Shape
from measuring.predictions import WANTED, count_near
from plan import opened, planner_of
from runner.models import model_of
from shape import LAYOUTS, SHAPES

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.control.planning import ClusterResources, predict_served
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.membership.worker_requests import profile_worker
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster
from llamaclust.core.errors import UsageError
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.control.profiles import ProfileWorker

_TOKENS, _PROMPT, _CONTEXT = 32, 512, 1024
_SHORT_PROMPT = 224  # behind it attention looks at as many keys as in the trials of workers
KINDS = ("steps", "products", "limits")


@dataclass(frozen=True, slots=True)
class Times:
    """ms of a token, and of a prompt."""

    token: float
    prompt: float


@dataclass(frozen=True, slots=True)
class Row:
    """Of a type: what was measured, and predicted / measured by each of KINDS."""

    quant_type: str
    measured: Times
    ratios: tuple[Times, ...]

    def __str__(self) -> str:
        token, prompt = ([getattr(each, what) for each in self.ratios] for what in ("token", "prompt"))
        cells = (f"{self.measured.token:9.2f}", *map(_cell, token), f"{self.measured.prompt:9.0f}", *map(_cell, prompt))
        return f"{self.quant_type:8}{' '.join(cells)}"


def _cell(ratio: float) -> str:
    return f"{ratio:8.2f}"


async def predicted(cluster: Cluster) -> tuple[Times, ...]:
    """By each of KINDS, by what the worker measures now."""
    model, workers = cluster.model, cluster.registry.present
    types = tuple(map(int, model.quant_types))
    order = ProfileWorker(str(model.file.path), model.model_id, 0, types)
    known = {name: await profile_worker(worker, order) for name, worker in workers.items()}
    products = {name: profile.map(DeviceProfile.without_steps) for name, profile in known.items()}
    limits = {name: profile.map(_limits) for name, profile in products.items()}
    return tuple(_times(cluster, profiles) for profiles in (known, products, limits))


def _limits(profile: DeviceProfile) -> DeviceProfile:
    return replace(profile, products=(), isolated_products=())


def _times(cluster: Cluster, profiles: Mapping[str, Profile]) -> Times:
    """Of the plan that serves, as of workers with these profiles."""
    workers = {name: WorkerResources.of(worker) for name, worker in cluster.registry.present.items()}
    resources = ClusterResources(workers, profiles, planner_of(cluster).links)
    found = predict_served(cluster.config, cluster.model, resources, cluster.plan)
    assert found is not None and cluster.plan.prompt_tokens == _PROMPT
    return Times(1e3 * found.token_s, 1e3 * found.ttft_s)


async def measured(cluster: Cluster, source: random.Random) -> Times:
    """As the worker's own figures, medians of steps."""
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    finished = await run(cluster, prompts(source, 1, _PROMPT, vocabulary)[0], 1)
    at_s = await token_times(cluster, prompts(source, 1, _SHORT_PROMPT, vocabulary)[0])
    return Times(1e3 * median(later - one for one, later in pairwise(at_s)), finished.timings.ttft_ms)


async def token_times(cluster: Cluster, prompt: tuple[int, ...]) -> list[float]:
    request = GenerationRequest("benchmark", prompt, _TOKENS, min_tokens=_TOKENS, max_drafted=0)
    events = cluster.engine.submit(request)
    return [time.perf_counter() async for event in events if isinstance(event, TokenSampled)]


async def measure(quant_type: QuantType, model: Path, threads: int, repeats: int) -> Row:
    shape = Shape(quant_type.name.lower().replace("_", "-"), "", True, (threads,))
    source = random.Random(quant_type.name)
    async with opened(shape, model, None, _CONTEXT) as cluster:
        await measured(cluster, source)  # warms up
        predictions, taken = [await predicted(cluster)], list[Times]()
        for _ in range(repeats):
            taken.append(await measured(cluster, source))
            predictions.append(await predicted(cluster))
    ratios = (_ratio([each[kind] for each in predictions], taken) for kind in range(len(KINDS)))
    typical = Times(median(each.token for each in taken), median(each.prompt for each in taken))
    return Row(quant_type.name, typical, tuple(ratios))


def _ratio(predictions: Sequence[Times], taken: Sequence[Times]) -> Times:
    """Each measurement lies between two predictions."""

    def of(what: Callable[[Times], float]) -> float:
        values = [what(each) for each in predictions]
        return median((values[i] + values[i + 1]) / 2 / what(times) for i, times in enumerate(taken))

    return Times(of(lambda times: times.token), of(lambda times: times.prompt))


def summary(rows: Sequence[Row]) -> Iterator[str]:
    for what in ("token", "prompt"):
        for kind, name in enumerate(KINDS):
            ratios = [getattr(row.ratios[kind], what) for row in rows]
            errors = [abs(ratio - 1) for ratio in ratios]
            error = f"median error {median(errors):.1%}, most {max(errors):.1%}"
            yield f"{what} by {name}: {count_near(ratios)} of {len(rows)} types within {WANTED:.0%}, {error}"


def table(path: Path) -> Iterator[str]:
    """In Markdown. UsageError for a file that `--json` did not write."""
    try:
        values = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [
            Row(value["quant_type"], Times(**value["measured"]), tuple(Times(**each) for each in value["ratios"]))
            for value in values
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--table {path}: is not a file that --json wrote") from error
    yield f"| type | token ms | {' | '.join(KINDS)} | prompt ms | {' | '.join(KINDS)} |"
    yield "|---" + "|--:" * (2 + 2 * len(KINDS)) + "|"
    for row in rows:
        token, prompt = ([f"{getattr(each, what):.2f}" for each in row.ratios] for what in ("token", "prompt"))
        measured = row.measured
        cells = (row.quant_type, f"{measured.token:.1f}", *token, f"{measured.prompt:.0f}", *prompt)
        yield f"| {' | '.join(cells)} |"


def main(given: argparse.Namespace) -> None:
    if given.table is not None:
        print("\n".join(table(given.table)))
        return
    print(f"{'type':8} {'token ms':>8} {' '.join(f'{kind:>8}' for kind in KINDS)} ", end="")
    print(f"{'prompt ms':>9} {' '.join(f'{kind:>8}' for kind in KINDS)}", flush=True)
    rows = []
    with nullcontext() if given.json is None else given.json.open("a") as file:
        for quant_type in given.types:
            with model_of(quant_type, given.shape, given.models) as path:
                rows.append(asyncio.run(measure(quant_type, path, given.threads, given.repeats)))
            print(rows[-1], flush=True)
            if file is not None:
                print(json.dumps(asdict(rows[-1])), file=file, flush=True)
    print("\n".join(summary(rows)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {quant_type.name: quant_type for quant_type in LAYOUTS}
    parser.add_argument("--types", type=listed(chosen("type", known)), default=list(LAYOUTS), help="all by default")
    parser.add_argument("--shape", default="1.1b", choices=SHAPES, help="%(default)s by default")
    parser.add_argument("--models", type=Path, help="a folder that holds files of some types already")
    parser.add_argument("--threads", type=positive, default=2, help="%(default)s by default")
    parser.add_argument("--repeats", type=positive, default=3, help="%(default)s by default")
    parser.add_argument("--json", type=Path, help="add a JSON line a type to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    return parser.parse_args()


if __name__ == "__main__":
    with ends_in_one_line():
        main(parse())
