"""Answers by a group as clients of the HTTP API receive them, in turns with one worker and with stages.

    python benchmarks/groups/served.py 7b IQ2_XXS [--delays 0,0.1,0.5,2] [--gbit 1]
    python benchmarks/groups/served.py 70b IQ1_S --layers 4                       # each layer counts 20 times
    python benchmarks/groups/served.py 70b IQ1_S --layers 4 --shares 2,1 --speeds 1,0.5
    python benchmarks/groups/served.py 7b IQ2_XXS --layers 8 --speculation

Clusters of `llamaclust up` with static workers of one thread, each on a core, over mutual TLS (--local: processes of
the coordinator, plain). All are there at the same time, with random weights in a shape of `shape.py`, and are measured
in turn: one answer after a short prompt, a long prompt to its first token, several answers at once. Ids and logprobs
must be those of one worker. The round trip and rate of links between members, and members slower than their cores, are
emulated by `emulated.cpp`. With --layers, models of two layers are measured as well, and times of the whole model
follow: what does not depend on layers counts once. Medians of turns, with the least and the most gain, and beside them
what the planner predicts from products and steps that one core was measured with before.

--speculation: instead, answers that repeat their prompt; all clusters draft.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from emulation import Emulation, LinkSpeed
from measuring.lines import report
from measuring.options import chosen, listed, natural, positive, zero_or_more
from served_figures import GROUP, HEADER, ONE, Depth, Turn, rows
from served_predictions import Predictions
from served_turns import REPEATED_PROMPT, Comparison, Key
from shape import LAYOUTS, SHAPES, Shape, check, metadata, tensors
from ways import Setup, Way, ways_of

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.devices.system_info import processor_name

_SEED = 1
_SHALLOW = 2
_NEUTRAL = ("attn_output.weight", "ffn_down.weight")
_PARTS = {"decode": "ms a token", "prefill": "ms to the first token", "together": "ms a token of all answers"}
_GOALS = {
    ("7b", "IQ2_XXS", 0.0): 1.60,
    ("7b", "IQ2_XXS", 0.1): 1.50,
    ("7b", "IQ1_S", 0.0): 1.75,
    ("7b", "IQ1_S", 0.1): 1.55,
    ("70b", "IQ1_S", 0.0): 1.60,
    ("70b", "IQ1_S", 0.5): 1.60,
    ("70b", "IQ1_S", 2.0): 1.35,
    ("1.1b", "IQ2_XXS", 0.0): 1.50,
}
"""Gains of decode by a group of two."""


def write_model(path: Path, name: str, shape: Shape, quant_type: QuantType, *, neutral: bool) -> None:
    """With random weights. `neutral`: layers add nothing to the hidden state, so that each token follows from the one
    before, and answers repeat themselves; they take as long as others."""
    check(shape, quant_type)
    sources = tensors(shape, quant_type, _SEED, alike=True)
    written = (_neutral(each) if neutral and each.name.endswith(_NEUTRAL) else each for each in sources)
    write_gguf(path, metadata(name, shape, quant_type), written)


def _neutral(source: TensorSource) -> TensorSource:
    return replace(source, produce=lambda: memoryview(bytes(source.n_bytes)))


async def compare(
    given: argparse.Namespace, layers: int, folder: Path, parts: Sequence[str]
) -> tuple[dict[Key, list[Turn]], Predictions | None]:
    shape, model = replace(given.shape_values, layers=layers), folder / f"layers-{layers}.gguf"
    report(f"writing {layers} layers")
    write_model(model, given.shape, shape, given.type, neutral=given.speculation)
    emulation = None if given.local else Emulation.build(folder)
    keys = {"speculative": "auto" if given.speculation else "off", "prefix_cache": given.speculation}
    context = max(1024, given.prompt + given.tokens + 64, 2 * REPEATED_PROMPT + given.tokens)
    setup = Setup(given.coordinator_core, context, emulation, {**keys, "max_sequences": max(8, given.together)})
    predictions = None
    if emulation is not None and not given.speculation:
        given_keys = {"context_length": context, **setup.keys}
        predictions = await asyncio.to_thread(Predictions.measured, model, given_keys, given.gbit)
    async with AsyncExitStack() as stack:
        report("starting the clusters")
        served = [await stack.enter_async_context(setup.serving(way, model, layers)) for way in given.ways]
        comparison = Comparison(given, served, emulation)
        await comparison.check()
        if given.speculation:
            given.repeated = await comparison.repeated()
        found = await comparison.measure(parts, given.repeats)
        print(f"{layers} layers: same ids and logprobs; {comparison.idleness}", flush=True)
    model.unlink()
    return found, predictions


async def measure(given: argparse.Namespace, folder: Path) -> None:
    sizes = {"decode": 1, "prefill": given.prompt, "together": given.together}
    parts = ["decode"] if given.speculation else [part for part in _PARTS if sizes[part]]
    depth = Depth(given.layers, _SHALLOW, SHAPES[given.shape].layers)
    exchanges_us = {} if given.local else show_links(given, Emulation.build(folder))
    few = (await compare(given, _SHALLOW, folder, parts))[0] if depth.layers < depth.whole else {}
    found, predictions = await compare(given, depth.layers, folder, parts)
    for part in parts:
        for trip in given.delays:
            predicted = predicted_ms(given, part, predictions, exchanges_us.get(trip))
            show(given, part, trip, depth, (found[part, trip], few.get((part, trip), [])), predicted)


def show_links(given: argparse.Namespace, emulation: Emulation) -> dict[float, float]:
    """Prints and returns what an exchange takes, by round trip."""
    cores = given.cores[:2]
    if len(set(cores)) < 2:
        return {}
    times = {}
    for trip in dict.fromkeys((0.0, *given.delays)):
        emulation.set(LinkSpeed(trip))
        times[trip] = emulation.exchange_us(cores)
    text = ", ".join(f"{us:.0f} at {trip:g} ms" for trip, us in times.items())
    print(f"an exchange of 16 KiB between the first two cores takes, us: {text}", flush=True)
    return times


def predicted_ms(
    given: argparse.Namespace, part: str, predictions: Predictions | None, exchange_us: float | None
) -> dict[str, float]:
    """By way; nothing of parts and links that plans do not predict."""
    if predictions is None or exchange_us is None:
        return {}
    if part == "prefill" and given.prompt != predictions.prompt_tokens:
        return {}
    return {way.name: predictions.ms(part, way, exchange_us) for way in given.ways}


def show(
    given: argparse.Namespace,
    part: str,
    trip: float,
    depth: Depth,
    turns: tuple[Sequence[Turn], Sequence[Turn]],
    predicted: Mapping[str, float],
) -> None:
    ways = [way.name for way in given.ways]
    goal = _GOALS.get((given.shape, given.type.name, trip))
    wanted = f", goal of the group {goal:.2f}" if goal and part == "decode" and given.shares == [1, 1] else ""
    print(f"\n{part}, {_PARTS[part]}, round trip {trip:g} ms{wanted}\n{HEADER}")
    for row in rows(*turns, depth, ways, predicted):
        print(row, flush=True)


def _speed(text: str) -> float:
    if not 0.01 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 0.01 to 1")
    return float(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    types = {kind.name: kind for kind in LAYOUTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shape", choices=SHAPES)
    add("type", type=chosen("type", types), metavar="TYPE")
    add("--layers", type=positive, help="fewer than the shape has, 3 or more; times are also of the whole model")
    add("--hidden", type=positive, help="another width, for tests")
    add("--delays", type=listed(zero_or_more), default="0,0.1,0.5,2", help="round trips, ms; %(default)s by default")
    add("--gbit", type=zero_or_more, default=0.0, help="at which a member receives; 0: as it can")
    add("--shares", type=listed(positive), default="1,1", help="of the members; %(default)s by default")
    add("--speeds", type=listed(_speed), help="of the members, relative to a core; 1 by default")
    add("--cores", type=listed(natural), help="of the members; in turn by default")
    add("--coordinator-core", type=natural, help="by default the second one")
    add("--ways", type=listed(str), help="only these, beside one worker: stages, group")
    add("--tokens", type=positive, help="of each answer; 32 by default, 256 with --speculation")
    add("--prompt", type=natural, default=512, help="tokens of the long prompt, 0: none; %(default)s by default")
    add("--together", type=natural, default=8, help="answers at once, 0: none; %(default)s by default")
    add("--speculation", action="store_true", help="answers that repeat their prompt, with drafts")
    add("--realtime", action="store_true", help="go before other programs while measuring; as root")
    add("--local", action="store_true", help="workers are processes of the coordinator, without TLS and emulation")
    add("--repeats", type=positive, default=5, help="turns; %(default)s by default")
    given = parser.parse_args(arguments)
    members, cpus = len(given.shares), sorted(os.sched_getaffinity(0))
    whole = SHAPES[given.shape]
    given.layers = given.layers or whole.layers
    given.tokens = given.tokens or (256 if given.speculation else 32)
    given.speeds = given.speeds or [1.0] * members
    given.cores = given.cores or [cpus[member % len(cpus)] for member in range(members)]
    given.coordinator_core = cpus[1 % len(cpus)] if given.coordinator_core is None else given.coordinator_core
    if members < 2 or {len(given.speeds), len(given.cores)} != {members}:
        parser.error("--shares, --speeds and --cores: two or more members, as many of each")
    if not _SHALLOW < given.layers <= whole.layers:
        parser.error(f"--layers: {_SHALLOW + 1} to {whole.layers}")
    if not {*given.cores, given.coordinator_core} <= {*cpus}:
        parser.error(f"cores are of {cpus}")
    if given.local and (given.gbit or max(given.delays) or min(given.speeds) < 1):
        parser.error("--local: without --delays, --gbit and --speeds, which are emulated between other workers")
    if given.hidden:
        whole = replace(whole, hidden=given.hidden, ffn=2 * given.hidden, vocabulary=512)
    given.shape_values, given.vocabulary = whole, whole.vocabulary
    given.ways = chosen_ways(given)
    return given


def chosen_ways(given: argparse.Namespace) -> list[Way]:
    every = ways_of(given.cores, given.shares, given.speeds)
    return [way for way in every if given.ways is None or way.name in (ONE, *given.ways)]


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    what = f"{given.shape} {given.type.name}, {given.layers} of {SHAPES[given.shape].layers} layers"
    print(
        f"{processor_name()}; {what}; {GROUP} {given.shares}, speeds {given.speeds}, coordinator on core "
        f"{given.coordinator_core}; {given.gbit or 'no limit of'} Gbit/s",
        flush=True,
    )
    os.sched_setaffinity(0, {given.coordinator_core})
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        asyncio.run(measure(given, Path(folder)))


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
