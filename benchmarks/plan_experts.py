"""Accuracy of plans of a mixture of experts on three workers: decode and prefill beside the plan's prediction.

    python benchmarks/shape.py 7b Q4_K moe.gguf --alike --hidden 2048 --layers 40 --heads 32 --kv-heads 4 \\
        --ffn 768 --experts 128 --experts-used 8
    python benchmarks/plan_experts.py moe.gguf [--repeats 3] [--only processes|hosts] [--workers-memory MIB]
        [--json PATH]

The shape above has 13 GB, of which a token reads a tenth. Three workers of one thread each get memory for less than
half of the model, once as processes of this machine, once on hosts of their own (network namespaces, round trip 1 ms,
1 Gbit/s; needs root). Each cluster starts with nothing measured; as in `plan.py`, a figure stands beside the mean of
two predictions, its own cluster's and the next one's. Exit code 1: a median is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from measuring.answers import prompts, run
from measuring.options import positive
from measuring.plan_shapes import Shape, at
from measuring.predictions import WANTED, count_near
from plan import layers_of, network, opened

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.server.coordinator import Cluster
from llamaclust.core.sizes import MIB
from llamaclust.model.gguf.model_file import open_model
from support.network.box import missing

_CONTEXT, _PROMPT = 1024, 512
_DECODE_PROMPT, _TOKENS = 224, 48  # attention looks at as many keys as in the trials of workers
_OWN_MIB = 700  # of a worker, beside its weights
_SHAPES = (
    Shape("processes", "three processes", True, (1, 1, 1)),
    Shape("hosts", "three hosts, round trip 1 ms, 1 Gbit/s", True, (1, 1, 1), links=(at(0.5, 1000),) * 3),
)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    token_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """Predictions, one more than measurements, between which those stand."""

    shape: str
    layers: str
    touched_bytes: int
    weight_bytes: int
    predicted: tuple[Times, ...]
    measured: tuple[Times, ...]

    def ratio(self, figure: str) -> float:
        """Median of predicted / measured."""
        said = values_of(self.predicted, figure)
        pairs = zip(said, said[1:], values_of(self.measured, figure), strict=False)
        return median((one + other) / 2 / taken for one, other, taken in pairs)


def values_of(series: Sequence[Times], figure: str) -> list[float]:
    return [times.token_s if figure == "token_s" else times.ttft_s for times in series]


def predicted(cluster: Cluster) -> Times:
    said = cluster.plan.prediction
    assert said is not None, "all workers are measured"
    assert cluster.plan.prompt_tokens == _PROMPT
    return Times(said.token_s, said.ttft_s)


async def measured(cluster: Cluster, source: random.Random) -> Times:
    """Of one request at a time."""
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    decoded = await run(cluster, prompts(source, 1, _DECODE_PROMPT, vocabulary)[0], _TOKENS)
    begun = time.perf_counter()
    await run(cluster, prompts(source, 1, _PROMPT, vocabulary)[0], 1)
    return Times(1 / decoded.timings.decode_tok_s, time.perf_counter() - begun)


async def measure(shape: Shape, model: Path, repeats: int) -> None:
    """Prints the row as JSON, before the namespaces end."""
    source, said, taken = random.Random(shape.name), [], []
    with network(shape) as box:
        for _ in range(repeats):
            async with opened(shape, model, box, _CONTEXT) as cluster:
                said.append(predicted(cluster))
                await measured(cluster, source)  # warms up
                taken.append(await measured(cluster, source))
        async with opened(shape, model, box, _CONTEXT) as cluster:
            said.append(predicted(cluster))
            stages = cluster.plan.stages
            touched = sum(stage.touched_bytes for stage in stages)
            held = sum(stage.weight_bytes for stage in stages)
            row = Row(shape.name, layers_of(cluster.plan), touched, held, tuple(said), tuple(taken))
            print(json.dumps(asdict(row)), flush=True)


def row_of_child(shape: Shape, given: argparse.Namespace) -> Row | None:
    """Measured in a process of its own: a thread cannot leave a network that it has entered."""
    if shape.links and (reason := missing()) is not None:
        print(f"{shape.name:10} not measured: {reason}", flush=True)
        return None
    own = ["--child", shape.name, "--repeats", str(given.repeats), "--workers-memory", str(given.workers_memory)]
    done = subprocess.run([sys.executable, __file__, str(given.model), *own], stdout=subprocess.PIPE, check=False)
    if not done.stdout:
        print(f"{shape.name:10} failed", flush=True)
        return None
    values = json.loads(done.stdout)
    times = {name: tuple(Times(**each) for each in values[name]) for name in ("predicted", "measured")}
    return Row(**{**values, **times})


def show(row: Row) -> None:
    print(f"{row.shape}: {row.layers}; a token reads {row.touched_bytes / MIB:.0f} of {row.weight_bytes / MIB:.0f} MiB")
    for figure, what in (("token_s", "decode, ms a token"), ("ttft_s", f"prefill of {_PROMPT}, ms")):
        said, taken = (1e3 * median(values_of(series, figure)) for series in (row.predicted, row.measured))
        ratio = row.ratio(figure)
        print(f"  {what:20} predicted {said:9.1f}  measured {taken:9.1f}  ratio {ratio:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--workers-memory", type=positive, help="MiB of each worker; 0.40 of the model unless given")
    parser.add_argument("--only", choices=[shape.name for shape in _SHAPES])
    parser.add_argument("--json", type=Path, help="write every figure to this file, a JSON line a cluster")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.workers_memory is None:
        given.workers_memory = int(0.40 * open_model(given.model).size_bytes / MIB) + _OWN_MIB
    shapes = [replace(shape, memory_mib=(given.workers_memory,) * len(shape.threads)) for shape in _SHAPES]
    if given.child:
        (shape,) = (each for each in shapes if each.name == given.child)
        asyncio.run(measure(shape, given.model, given.repeats))
        return 0
    shapes = [shape for shape in shapes if given.only in (None, shape.name)]
    rows = [row for shape in shapes if (row := row_of_child(shape, given)) is not None]
    for row in rows:
        show(row)
    if given.json is not None:
        given.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    ratios = [row.ratio(figure) for row in rows for figure in ("token_s", "ttft_s")]
    within = count_near(ratios)
    print(f"{within} of {len(ratios)} within {WANTED:.0%}")
    return 0 if ratios and within == len(ratios) else 1


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main())
