"""Gain of drafted tokens across links: workers of one thread each on emulated hosts, in turns with plain decode.

    python benchmarks/speculation/distant.py MODEL.gguf [--round-trip 20 --stages 2]     (as root: network namespaces)

The coordinator is on the first worker's host, and every other worker has a host of its own; with --apart, the
coordinator has one as well. Each link takes half a round trip. Medians of pairs: prompts that are copied and open
questions, with n-gram drafts; recorded answers of which 80 % are drafted right. Of copies, the exact ones have 90 % of
their tokens from the text that was asked for. At a round trip below a millisecond, copies are also measured beside one
worker that has no network and drafts nothing. Both ways must have the same tokens and logprobs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parents[2] / "tests")]

from corpus import Prompt, prompts  # noqa: E402
from measuring.lines import show  # noqa: E402
from measuring.options import chosen, listed, positive  # noqa: E402
from network import COORDINATOR, distant_cluster, local_cluster  # noqa: E402
from recorded import RecordedDrafters  # noqa: E402
from replay import Replay, Sizes  # noqa: E402
from row_costs import machine  # noqa: E402
from texts import request_of  # noqa: E402
from turns import CONTEXT, Pair, Served, answer, check_same, drafting_with, pair, summary  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest  # noqa: E402
from llamaclust.core.errors import UsageError  # noqa: E402
from llamaclust.model.loader import Model  # noqa: E402
from support.network.box import Box, missing  # noqa: E402
from support.network.link import Link  # noqa: E402
from support.network.namespaces import entered  # noqa: E402

_ACCEPTANCE = 0.8
_NEAR_MS = 1.0
_PARTS = ("copy", "replay", "prose")
_GOALS = {
    ("copy", 20.0, 2): ">= 8",
    ("replay", 20.0, 2): ">= 3",
    ("copy", 50.0, 4): ">= 10",
}
"""By part, round trip in milliseconds, and stages."""


def asked_of(model: Served, kind: str, given: argparse.Namespace) -> list[Prompt]:
    """One more than the repeats: the first pair, from which the scheduler learns, does not count."""
    return list(prompts(model.model, (kind,), given.repeats + 1, given.characters, given.seed))


def requests(model: Served, asked: list[Prompt], given: argparse.Namespace) -> list[GenerationRequest]:
    return [request_of(model, prompt, given.tokens, number) for number, prompt in enumerate(asked)]


async def pairs_of(model: Served, asked: list[Prompt], given: argparse.Namespace) -> list[Pair]:
    ways = enumerate(requests(model, asked, given))
    return [await pair(model.engine, request, turn) for turn, request in ways][1:]


async def replayed(model: Served, drafters: RecordedDrafters, given: argparse.Namespace) -> list[Pair]:
    return await Replay(model, drafters, Sizes(given.tokens, given.repeats), given.seed).gains(_ACCEPTANCE)


async def beside_one(one: Served, distant: Served, given: argparse.Namespace) -> list[float]:
    """Copies with drafts on distant workers beside one worker without."""
    ratios = []
    for request in requests(distant, asked_of(distant, "copy", given), given):
        plain = await answer(one.engine, replace(request, max_drafted=0))
        drafted = await answer(distant.engine, request)
        check_same(plain, drafted)
        ratios.append(drafted.tok_s / plain.tok_s)
    return ratios[1:]


def show_pairs(part: str, pairs: list[Pair], given: argparse.Namespace) -> None:
    print(f"{part}: {summary(pairs)}")
    goal = ">= 0.97" if part == "prose" else _GOALS.get((part, given.round_trip, given.stages), "")
    show(f"{part}: gain at {given.round_trip:g} ms, {given.stages} stages", [each.gain for each in pairs], goal)


def show_exact(part: str, pairs: list[Pair]) -> None:
    """Those whose answers are what was asked for, where there are some."""
    if pairs:
        show(f"{part}: gain of {len(pairs)} exact answers", [each.gain for each in pairs], "")


def even_plan(path: Path, workers: list[str]) -> str:
    """Key of the cluster file: every worker has as many layers, whatever this machine's noise makes of their speeds."""
    with Model.open(path) as model:
        layers = model.layer_count
    if layers < len(workers):
        raise UsageError(f"--stages: {len(workers)} for {layers} layers; give {layers} or less")
    ends = [layers * number // len(workers) for number in range(len(workers) + 1)]
    stages = zip(workers, ends, ends[1:], strict=False)
    return f"plan=[{', '.join(f'{{worker: {name}, layers: [{start}, {end}]}}' for name, start, end in stages)}]"


async def measure(box: Box, workers: list[str], given: argparse.Namespace) -> None:
    drafters = RecordedDrafters()
    with tempfile.TemporaryDirectory() as folder, drafting_with(drafters):
        async with distant_cluster(
            box,
            given.model,
            Path(folder),
            workers,
            [even_plan(given.model, workers)],
            None if given.apart else workers[0],
        ) as cluster:
            distant = Served(cluster.engine, cluster.model)
            box.set_link(Link.of_round_trip(given.round_trip / 1e3))
            for part in given.parts:
                if part == "replay":
                    show_pairs(part, await replayed(distant, drafters, given), given)
                    continue
                asked = asked_of(distant, part, given)
                pairs = await pairs_of(distant, asked, given)
                show_pairs(part, pairs, given)
                of_prompts = zip(asked[1:], pairs, strict=True)
                show_exact(part, [own for prompt, own in of_prompts if prompt.is_exact(own.plain.tokens)])
            if given.round_trip < _NEAR_MS and "copy" in given.parts:
                async with local_cluster(given.model, Path(folder)) as alone:
                    ratios = await beside_one(Served(alone.engine, alone.model), distant, given)
                    show(f"copy: {given.stages} stages with drafts / one worker, plain", ratios, ">= 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="path of a .gguf")
    parser.add_argument("--round-trip", type=float, default=20.0, help="milliseconds; %(default)s by default")
    parser.add_argument("--stages", type=positive, default=2, help="workers; %(default)s by default")
    parser.add_argument("--parts", type=listed(chosen("--parts", {part: part for part in _PARTS})), default=_PARTS)
    parser.add_argument("--apart", action="store_true", help="the coordinator has a host of its own")
    parser.add_argument("--repeats", type=positive, default=5, help="pairs; %(default)s by default")
    parser.add_argument("--tokens", type=positive, default=200, help="of an answer, at most; %(default)s by default")
    parser.add_argument("--characters", type=positive, default=1200, help="of a text in a prompt")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if not 2 <= given.tokens <= CONTEXT // 2:
        parser.error(f"--tokens must be 2 to {CONTEXT // 2}")
    if not 0 <= given.round_trip <= 1000:
        parser.error("--round-trip must be 0 to 1000 milliseconds")
    if (reason := missing()) is not None:
        sys.exit(f"error: {reason}")
    print(machine(1), f"seed {given.seed}", sep=", ")
    workers = [f"w{number}" for number in range(given.stages)]
    hosts = workers if given.apart else workers[1:]
    with Box([COORDINATOR, *hosts], delays=True) as box, entered(box[COORDINATOR].namespace):
        asyncio.run(measure(box, workers, given))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
