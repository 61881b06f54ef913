"""Accuracy of plans for every quant type: predicted and measured time of a token of one shape, one worker.

    python benchmarks/quant_types/plan_types.py [--types Q4_K,IQ1_S] [--shape 1.1b] [--threads 2] [--repeats 1]

For each type a file is written, and a cluster started as a newcomer's, with nothing measured before. A line has the
measured ms a token, and predicted / measured: of the plan, by steps of the model that the worker measured; by products
alone (a worker without the model file); and by its limits alone, as `plan --assume` predicts. As in benchmarks/plan.py,
a prediction is the mean of this cluster's and the next one's. Half a minute a type and repeat, longer for large files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from all_types import model_of
from compare import chosen, listed, positive
from plan import measured_ms, opened, planner_of, predicted_ms
from plan_shapes import Shape
from shape import LAYOUTS, SHAPES

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.control.planning import ClusterResources, predict_served
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.server.coordinator import Cluster
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.model.quant_types import QuantType

_TOKENS = 48
_WANTED = 0.15


@dataclass(frozen=True, slots=True)
class Predicted:
    """ms a token."""

    steps: float
    products: float
    limits: float


@dataclass(frozen=True, slots=True)
class Row:
    """Of a type: measured ms a token, and medians of predicted / measured."""

    quant_type: str
    measured: float
    steps: float
    products: float
    limits: float

    def __str__(self) -> str:
        return f"{self.quant_type:8} {self.measured:9.2f} {self.steps:9.2f} {self.products:9.2f} {self.limits:9.2f}"


HEADER = "type      measured     steps  products    limits"


def predicted(cluster: Cluster) -> Predicted:
    known = planner_of(cluster).profiles.of(cluster.registry.present)

    def by(profiles: dict[str, Profile]) -> float:
        workers = {name: WorkerResources.of(worker) for name, worker in cluster.registry.present.items()}
        resources = ClusterResources(workers, profiles)
        found = predict_served(cluster.config, cluster.model, resources, cluster.plan)
        assert found is not None
        return 1e3 * found.token_s

    products = {name: profile.map(DeviceProfile.without_steps) for name, profile in known.items()}
    limits = {name: profile.map(_limits) for name, profile in products.items()}
    return Predicted(predicted_ms(cluster), by(products), by(limits))


def _limits(profile: DeviceProfile) -> DeviceProfile:
    return replace(profile, products=(), isolated_products=())


async def measure(quant_type: QuantType, model: Path, threads: int, repeats: int) -> Row:
    shape = Shape(quant_type.name.lower().replace("_", "-"), "", True, (threads,))
    source, predictions, taken = random.Random(quant_type.name), list[Predicted](), list[float]()
    for number in range(repeats + 1):
        async with opened(shape, model, None) as cluster:
            predictions.append(predicted(cluster))
            if number < repeats:
                await measured_ms(cluster, source, _TOKENS)  # warms up
                taken.append(await measured_ms(cluster, source, _TOKENS))
    return Row(quant_type.name, median(taken), *_ratios(predictions, taken))


def _ratios(predictions: Sequence[Predicted], taken: Sequence[float]) -> Iterator[float]:
    """Of each kind of prediction: the mean of those around a measurement."""
    for kind in ("steps", "products", "limits"):
        values = [getattr(each, kind) for each in predictions]
        yield median((values[i] + values[i + 1]) / 2 / measured for i, measured in enumerate(taken))


def summary(rows: Sequence[Row]) -> Iterator[str]:
    for kind in ("steps", "products", "limits"):
        errors = [abs(getattr(row, kind) - 1) for row in rows]
        within = sum(error <= _WANTED for error in errors)
        yield f"by {kind}: {within} of {len(rows)} types within {_WANTED:.0%}, median error {median(errors):.1%}"


def main(given: argparse.Namespace) -> None:
    print(HEADER, flush=True)
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
    return parser.parse_args()


if __name__ == "__main__":
    with ends_in_one_line():
        main(parse())
