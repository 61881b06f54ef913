"""Accuracy of plans: predicted and measured speed of clusters of ten shapes.

    python benchmarks/plan.py SMALL.gguf LARGE.gguf [--shapes one,two] [--repeats 3] [--random 20] [--json PATH]

SMALL is the demo model, LARGE one of a gigabyte or so (`benchmarks/shape.py 1.1b Q4_K`). Each cluster is started as a
newcomer's, with nothing measured before, and its plan says what a token will take. Machines change their speed, so a
request's time per token stands beside the mean of two predictions: its own cluster's, and the next one's, which is
started right behind it. A line a shape: medians of such pairs, and the ratio predicted / measured with its least and
most. Then random plans for the same workers serve in turn with the chosen one: `best random` is the fastest one's time
beside the chosen plan's, `noise` how far apart the chosen plan's own times were. Shapes with links need root (network
namespaces).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()
sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from measuring.answers import prompts, run  # noqa: E402
from measuring.plan_shapes import SHAPES, Shape  # noqa: E402
from measuring.predictions import WANTED, count_near  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402
from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.config.sections import PlanEntry  # noqa: E402
from llamaclust.cluster.control.memory_ledger import MemoryLedger  # noqa: E402
from llamaclust.cluster.control.observations import Signal  # noqa: E402
from llamaclust.cluster.control.planning import ClusterPlanner  # noqa: E402
from llamaclust.cluster.membership.worker_handle import WorkerHandle  # noqa: E402
from llamaclust.cluster.planner.adjacency import Pairs  # noqa: E402
from llamaclust.cluster.planner.links import Links  # noqa: E402
from llamaclust.cluster.planner.plan import Plan, Prediction  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.directory import ClusterDir  # noqa: E402
from llamaclust.cluster.state.events import AwaitingWorkers, Event, Report  # noqa: E402
from llamaclust.core.errors import InsufficientMemoryError, UsageError, WorkerError  # noqa: E402
from support.network.box import Box, missing  # noqa: E402
from support.network.namespaces import enter  # noqa: E402

_COORDINATOR = "coordinator"
_TOGETHER = 8
_PROMPT, _TOKENS = 224, 48  # attention looks at as many keys as in the trials of workers
_LOAD_S = 15.0
_END_S = 10.0
_AGAIN = 5
_WANTED_MEDIAN = 0.08


@dataclass(frozen=True, slots=True)
class Pair:
    """ms a token."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


@dataclass(frozen=True, slots=True)
class Row:
    """What is found of a shape."""

    shape: str
    layers: str
    pairs: tuple[Pair, ...]
    best_random: float | None  # fastest random plan / chosen one, by time
    noise: float
    random: int  # plans that were tried

    @property
    def ratio(self) -> float:
        return median(pair.ratio for pair in self.pairs)


# -- clusters of a shape -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(shape: Shape, model: Path, box: Box | None, context_length: int = 512) -> AsyncIterator[Cluster]:
    """With nothing measured before."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as hosts:
        directory = ClusterDir(Path(folder) / shape.name)
        directory.create()
        keys = [f"model={model}", f"context_length={context_length}", "max_sequences=8", f"objective={shape.objective}"]
        keys.append(f"state_dir={folder}")
        report: Report = lambda event: None  # noqa: E731
        if box is None:
            keys.append(f"workers=[{', '.join(_worker(name, *own) for name, own in shape.workers.items())}]")
        else:
            here = box[_COORDINATOR].address
            keys += ["launcher=static", f"join={{listen: {here}:7100, members: {here}:7101}}"]
            keys.append(f"workers=[{', '.join(f'{{name: {name}}}' for name in shape.workers)}]")
            report = _starter(shape, box, directory.path.parent / ".trust" / "token", hosts)
        async with open_cluster(load_config(None, keys), [model], directory, report, GivenPlans) as cluster:
            yield cluster


def _worker(name: str, threads: int, memory_mib: int | None) -> str:
    memory = "" if memory_mib is None else f", memory: {memory_mib}MiB"
    return f"{{name: {name}, threads: {threads}{memory}}}"


def _starter(shape: Shape, box: Box, token: Path, hosts: ExitStack) -> Report:
    """Workers that end with `hosts`."""
    here = box[_COORDINATOR].address

    def report(event: Event) -> None:
        if not isinstance(event, AwaitingWorkers):
            return
        for name, (threads, memory_mib) in shape.workers.items():
            own = f"--join {here}:7100 --name {name} --threads {threads} --token-file {token}"
            memory = "" if memory_mib is None else f" --memory {memory_mib}MiB"
            command = f"-P -m llamaclust worker {own}{memory}"
            worker = box.start(name, sys.executable, *command.split(), stderr=subprocess.DEVNULL)
            hosts.callback(_end, worker)

    return report


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait(_END_S)


@contextmanager
def network(shape: Shape) -> Iterator[Box | None]:
    """From here on this process is on the coordinator's host."""
    if not shape.links:
        yield None
        return
    with Box([_COORDINATOR, *shape.workers], delays=True) as box:
        for name, link in zip(shape.workers, shape.links, strict=True):
            box.set_link(link, name)
        enter(box[_COORDINATOR].namespace)
        yield box


# -- predicted and measured --------------------------------------------------------------------------------------------


def predicted_ms(cluster: Cluster) -> float:
    assert cluster.plan.prediction is not None
    return _ms(cluster.plan.prediction, cluster.config.objective)


def _ms(prediction: Prediction, objective: str) -> float:
    return 1e3 * prediction.token_s if objective == "latency" else 1e3 / prediction.tokens_per_s


async def measured_ms(cluster: Cluster, source: random.Random, tokens: int) -> float:
    """`throughput`: of eight requests together, from the time when all of them decode."""
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    if cluster.config.objective == "latency":
        finished = await run(cluster, prompts(source, 1, _PROMPT, vocabulary)[0], tokens)
        return 1e3 / finished.timings.decode_tok_s
    requested = prompts(source, _TOGETHER, 1, vocabulary)
    begun = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, 2 * tokens) for prompt in requested))
    return (time.perf_counter() - begun) * 1e3 / (_TOGETHER * 2 * tokens)


def pairs_of(predicted: Sequence[float], measured: Sequence[float]) -> tuple[Pair, ...]:
    """Each between two predictions."""
    return tuple(Pair((predicted[i] + predicted[i + 1]) / 2, taken) for i, taken in enumerate(measured))


# -- random plans ------------------------------------------------------------------------------------------------------


def random_entries(cluster: Cluster, source: random.Random) -> list[PlanEntry]:
    """Some of the workers in some order, cut anywhere."""
    layers = cluster.model.layer_count
    names = source.sample(sorted(cluster.registry.present), source.randint(1, len(cluster.registry.present)))
    inner = sorted(source.sample(range(1, layers), len(names) - 1))
    bounds = [0, *inner, layers]
    return [PlanEntry(worker=name, layers=(bounds[i], bounds[i + 1])) for i, name in enumerate(names)]


async def random_plans(cluster: Cluster, source: random.Random, count: int) -> list[Plan]:
    """That fit, each another one; fewer where there are few."""
    found: dict[str, Plan] = {}
    for _ in range(100 * count):
        if len(found) < count:
            by_hand = copy.copy(planner_of(cluster))
            by_hand.given = None
            by_hand.config = cluster.config.model_copy(update={"plan": random_entries(cluster, source)})
            try:
                plan = await by_hand.plan(cluster.registry.present)
            except (InsufficientMemoryError, UsageError):
                continue
            if layers_of(cluster.plan) != layers_of(plan):
                found[layers_of(plan)] = plan
    return list(found.values())


def layers_of(plan: Plan) -> str:
    return " ".join(f"{stage.worker}:{stage.end - stage.start}" for stage in plan.stages)


async def serve(cluster: Cluster, plan: Plan) -> None:
    """The plan's epoch, and no other, in place of the one that serves. TimeoutError where it does not load."""
    supervisor = cluster.supervisor
    planner_of(cluster).given = plan
    supervisor.observed.post(Signal.LINKS_CHANGED)
    cluster.engine.interrupt(WorkerError("another plan is tried"))
    async with asyncio.timeout(_LOAD_S):
        while supervisor.observed.state.loss is not None or layers_of(cluster.plan) != layers_of(plan):  # noqa: ASYNC110  nothing reports it
            await asyncio.sleep(0.01)


class GivenPlans(ClusterPlanner):
    """Makes the plan that it is given, once there is one."""

    given: Plan | None = None

    def update(self, links: Links) -> bool:
        return self.given is None and super().update(links)

    async def plan(
        self, workers: Mapping[str, WorkerHandle], partitions: Pairs = frozenset(), beside: MemoryLedger | None = None
    ) -> Plan:
        return self.given or await super().plan(workers, partitions, beside)


def planner_of(cluster: Cluster) -> GivenPlans:
    assert isinstance(cluster.supervisor.planner, GivenPlans)
    return cluster.supervisor.planner


async def asked_for_ms(cluster: Cluster, source: random.Random) -> float:
    """What the objective makes least: time per token, or, for `throughput`, of eight requests with four times as many
    tokens of prompt as of answer."""
    if cluster.config.objective == "latency":
        return await measured_ms(cluster, source, _TOKENS // 2)
    requested = prompts(source, _TOGETHER, 2 * _TOKENS, cluster.model.hyperparameters.vocabulary_size)
    begun = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, _TOKENS // 2) for prompt in requested))
    return (time.perf_counter() - begun) * 1e3


async def beside_random(cluster: Cluster, source: random.Random, count: int) -> tuple[float | None, float, int]:
    """(best random plan's time / the chosen one's, spread of the chosen one's, plans): both in turn, and the best one
    several times again, since the least of many figures is less than its plan deserves."""
    chosen, plans = cluster.plan, await random_plans(cluster, source, count)

    async def timed(plan: Plan) -> float:
        await serve(cluster, plan)
        await measured_ms(cluster, source, 8)
        return min([await asked_for_ms(cluster, source) for _ in range(2)])

    own = [await timed(chosen)]

    async def beside(plan: Plan) -> float:
        try:
            taken = await timed(plan)
        except TimeoutError:  # it does not fit beside what a process has taken since
            taken = inf
        own.append(await timed(chosen))
        return 2 * taken / (own[-2] + own[-1])

    ratios = [(await beside(plan), plan) for plan in plans]
    if not ratios:
        return None, 0.0, 0
    _, fastest = min(ratios, key=lambda one: one[0])
    best = median([await beside(fastest) for _ in range(_AGAIN)])
    return best, 2 * median(abs(b - a) / (a + b) for a, b in pairwise(own)), len(ratios)


# -- the table ---------------------------------------------------------------------------------------------------------


async def measure(shape: Shape, model: Path, repeats: int, count: int) -> None:
    """Prints the row as JSON, before the box ends: that ends all processes on its hosts, this one too."""
    source = random.Random(shape.name)
    predicted, taken = [], []
    with network(shape) as box:
        for _ in range(repeats):
            async with opened(shape, model, box) as cluster:
                predicted.append(predicted_ms(cluster))
                await measured_ms(cluster, source, _TOKENS)  # warms up
                taken.append(await measured_ms(cluster, source, _TOKENS))
        async with opened(shape, model, box) as cluster:
            pairs = pairs_of([*predicted, predicted_ms(cluster)], taken)
            best, noise, tried = await beside_random(cluster, source, count) if count else (None, 0.0, 0)
            row = Row(shape.name, layers_of(cluster.plan), pairs, best, noise, tried)
            print(json.dumps(asdict(row)), flush=True)


def row_of_child(shape: Shape, given: argparse.Namespace) -> Row | None:
    """Measured in a process of its own: a thread cannot leave a network that it has entered."""
    if shape.links and (reason := missing()) is not None:
        print(f"{shape.name:14} not measured: {reason}", flush=True)
        return None
    own = ["--child", shape.name, "--repeats", str(given.repeats), "--random", str(given.random)]
    done = subprocess.run(
        [sys.executable, __file__, str(given.small), str(given.large), *own], stdout=subprocess.PIPE, check=False
    )
    if not done.stdout:
        print(f"{shape.name:14} failed", flush=True)
        return None
    values = json.loads(done.stdout)
    return Row(**{**values, "pairs": tuple(Pair(**pair) for pair in values["pairs"])})


def show(shape: Shape, row: Row) -> None:
    predicted, taken = (median(getattr(p, which) for p in row.pairs) for which in ("predicted", "measured"))
    ratios = sorted(pair.ratio for pair in row.pairs)
    best = "-" if row.best_random is None else f"{row.best_random:.2f} of {row.random}, noise {row.noise:.2f}"
    print(
        f"{row.shape:14} {row.layers:18} {predicted:8.2f} {taken:9.2f} {row.ratio:8.3f}"
        f"   {ratios[0]:.2f} .. {ratios[-1]:.2f}   {best:26} {shape.what}",
        flush=True,
    )


def summary(rows: list[Row]) -> None:
    errors = [abs(row.ratio - 1) for row in rows]
    within = count_near(row.ratio for row in rows)
    print(f"{within} of {len(rows)} shapes within {WANTED:.0%}; median error {median(errors):.1%}, ", end="")
    print(f"most {max(errors):.1%} (wanted: each within {WANTED:.0%}, {_WANTED_MEDIAN:.0%} in the median)")
    compared = [row for row in rows if row.best_random is not None]
    if compared:
        faster = [row.shape for row in compared if row.best_random is not None and row.best_random < 1 - row.noise]
        what = f"faster by more than the noise: {', '.join(faster)}" if faster else "none faster by more than the noise"
        print(f"{sum(row.random for row in compared)} random plans, {what}")


def positive_or_zero(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("--shapes", help=f"some of {','.join(shape.name for shape in SHAPES)}")
    parser.add_argument("--repeats", type=positive_or_zero, default=3)
    parser.add_argument("--random", type=positive_or_zero, default=20, help="random plans of each shape; 0: none")
    parser.add_argument("--json", type=Path, help="write every figure to this file, a JSON line a shape")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = {shape.name: shape for shape in SHAPES}
    if given.child:
        shape = known[given.child]
        model = given.large if shape.is_large else given.small
        asyncio.run(measure(shape, model, given.repeats, given.random))
        return
    names = given.shapes.split(",") if given.shapes else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such shape: {', '.join(unknown)}")
    print(f"{'shape':14} {'layers':18} predicted  measured   ratio   least .. most   best random / chosen")
    rows = []
    for name in names:
        row = row_of_child(known[name], given)
        if row is not None:
            show(known[name], row)
            rows.append(row)
    if given.json is not None:
        given.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if rows:
        summary(rows)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
