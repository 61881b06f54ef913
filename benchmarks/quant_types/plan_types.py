"""Accuracy of plans for every quant type: predicted and measured times of one shape on one worker.

    python benchmarks/quant_types/plan_types.py [--types Q4_K,IQ1_S] [--shape 1.1b] [--threads 2] [--repeats 1]
    python benchmarks/quant_types/plan_types.py --table plans.jsonl

For each type a file is written, and a cluster started as a newcomer's, with nothing measured before. A line has the
measured ms of a token and of a prompt of 512 tokens, and predicted / measured: of the plan, by steps of the model that
the worker measured; by products alone (a worker without the model file); and by its limits alone, as `plan --assume`
predicts. As in benchmarks/plan.py, a prediction is the mean of this cluster's and the next one's. Half a minute a type
and repeat, longer for large files. `--table` prints a file of `--json` as the table of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from all_types import model_of
from compare import chosen, listed, positive
from plan import measured_ms, opened, planner_of
from plan_shapes import Shape
from shape import LAYOUTS, SHAPES
from split import prompts, run

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.control.planning import ClusterResources, predict_served
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.server.coordinator import Cluster
from llamaclust.core.errors import UsageError
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.model.quant_types import QuantType

_TOKENS, _PROMPT, _CONTEXT = 48, 512, 1024
_WANTED = 0.15
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


def predicted(cluster: Cluster) -> tuple[Times, ...]:
    """By each of KINDS."""
    known = planner_of(cluster).profiles.of(cluster.registry.present)
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
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    await measured_ms(cluster, source, _TOKENS)  # warms up
    token = await measured_ms(cluster, source, _TOKENS)
    finished = [await run(cluster, prompt, 1) for prompt in prompts(source, 2, _PROMPT, vocabulary)]
    return Times(token, min(each.timings.ttft_ms for each in finished))


async def measure(quant_type: QuantType, model: Path, threads: int, repeats: int) -> Row:
    shape = Shape(quant_type.name.lower().replace("_", "-"), "", True, (threads,))
    source, predictions, taken = random.Random(quant_type.name), list[tuple[Times, ...]](), list[Times]()
    for number in range(repeats + 1):
        async with opened(shape, model, None, _CONTEXT) as cluster:
            predictions.append(predicted(cluster))
            if number < repeats:
                taken.append(await measured(cluster, source))
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
            errors = [abs(getattr(row.ratios[kind], what) - 1) for row in rows]
            within = sum(error <= _WANTED for error in errors)
            error = f"median error {median(errors):.1%}, most {max(errors):.1%}"
            yield f"{what} by {name}: {within} of {len(rows)} types within {_WANTED:.0%}, {error}"


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
    parser.add_argument("--repeats", type=positive, default=1, help="%(default)s by default")
    parser.add_argument("--json", type=Path, help="add a JSON line a type to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    return parser.parse_args()


if __name__ == "__main__":
    with ends_in_one_line():
        main(parse())
