"""Gain of a draft model beside what its cost, that of rows and its acceptance allow: random weights, by construction.

    python benchmarks/speculation/draft_model.py [--shape 1.1b] [--type Q4_K] [--layers 4] [--strengths 0,0.1,0.3]

The draft model is the first layers of the model. What the later layers add to the hidden state is so many times weaker
than usual: with strength 0 nothing, so every draft is right. Acceptance is the share of an answer's tokens that the
draft model would choose too. The prediction for an answer goes through these with the best fixed number of drafted
tokens; the costs that it counts with are means of before and after the answers. Nothing is drafted from n-grams. Both
ways must have the same tokens and logprobs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring.lines import show
from measuring.options import listed, positive
from recorded import NoDrafters
from row_costs import RowCosts, machine, measured
from shape import LAYOUTS, SHAPES, Shape, metadata, random_matrix, tensors
from turns import Pair, Served, check_same, pair, summary

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.launchers.draft_model import LoadedDraftModel
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.speculation.draft_model import DraftTimes
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType

_PROMPT = 64
_CONTEXT = 1024
_ADDING = ("attn_output.weight", "ffn_down.weight")
"""Matrices whose products are added to the hidden state."""


def write_pair(folder: Path, shape: Shape, quant_type: QuantType, layers: int, strength: float) -> tuple[Path, Path]:
    """The model and its draft model."""
    draft = replace(shape, layers=layers)
    paths = folder / "model.gguf", folder / "draft.gguf"
    for path, each in zip(paths, (shape, draft), strict=True):
        sources = (_weakened(source, layers, strength) for source in tensors(each, quant_type, 1, alike=True))
        write_gguf(path, metadata("speculation", each, quant_type), sources)
    return paths


def _weakened(source: TensorSource, layers: int, strength: float) -> TensorSource:
    _, _, name = source.name.partition("blk.")
    if not name.endswith(_ADDING) or int(name.split(".")[0]) < layers:
        return source
    if not strength:
        return replace(source, produce=lambda: memoryview(bytes(source.n_bytes)))
    generator = np.random.default_rng(len(name))
    return replace(source, produce=lambda: random_matrix(generator, source.quant_type, source.shape, strength))


async def pairs_of(served: Served, given: argparse.Namespace) -> dict[tuple[int, ...], Pair]:
    """One prompt a pair; the first pair, from which the scheduler learns, does not count."""
    draw, pairs = random.Random(given.seed), {}
    for turn in range(given.repeats + 1):
        prompt = tuple(draw.randrange(served.vocabulary) for _ in range(_PROMPT))
        both = await pair(served.engine, GenerationRequest(f"draft-{turn}", prompt, given.tokens), turn)
        check_same(both.plain, both.drafted)
        if turn:
            pairs[prompt] = both
    return pairs


def right_tokens(client: LocalClient, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> list[bool]:
    """Which tokens of an answer the draft model would choose too, where it knows those before them."""
    chosen = client.logits((*prompt, *tokens))[len(prompt) - 1 : -1].argmax(axis=1)
    return [bool(same) for same in chosen == np.array(tokens)]


def rounds_of(right: Sequence[bool], count: int) -> int:
    """Rounds of an answer with so many drafted tokens in each, of which these would be right."""
    rounds = place = 0
    while place < len(right):
        window = right[place : place + count]
        place += 1 + (window.index(False) if False in window else len(window))
        rounds += 1
    return rounds


def predicted_gain(costs: RowCosts, times_ns: Sequence[float], right: Sequence[bool]) -> tuple[int, float]:
    """With the best fixed number of drafted tokens: that, and the gain. `times_ns`: of drafts of 0, 1, ... tokens."""
    gains = {
        count: len(right) * costs.at(1) / (rounds_of(right, count) * (costs.at(1 + count) + draft_ns))
        for count, draft_ns in enumerate(times_ns)
    }
    return max(gains.items(), key=lambda item: item[1])


def _times_ns(times: DraftTimes) -> list[float]:
    """Of drafts of 0, 1, ... tokens of one sequence."""
    return [0.0, *(times.draft_ns(1, count, 1) for count in range(1, MAX_WINDOW + 1))]


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


async def measure(paths: tuple[Path, Path], strength: float, given: argparse.Namespace) -> None:
    model_path, draft_path = paths
    place = _PROMPT + given.tokens // 2
    before = measured(model_path, given.threads, place)
    settings = LocalSettings(context_length=_CONTEXT, draft_model=draft_path)
    stage = LocalStage(model_path, given.threads, None, settings)
    own = stage.scheduling.speculation
    assert own is not None and isinstance(own.draft_model, LoadedDraftModel)
    scheduling = replace(stage.scheduling, speculation=replace(own, drafters=NoDrafters()))
    times = own.draft_model.times
    first_ns = _times_ns(times)
    pipeline = LocalPipeline(stage)
    with stage.model:
        async with Engine(pipeline, scheduling) as engine:
            pairs = await pairs_of(Served(engine, stage.model), given)
        stage.close()
    costs = RowCosts.mean(before, measured(model_path, given.threads, place))
    times_ns = [(one + other) / 2 for one, other in zip(first_ns, _times_ns(times), strict=True)]
    with LocalClient(draft_path) as client:
        rights = [right_tokens(client, prompt, both.plain.tokens) for prompt, both in pairs.items()]
    predicted = [predicted_gain(costs, times_ns, right) for right in rights]
    gains = [both.gain for both in pairs.values()]
    acceptance = ", ".join(f"{sum(right) / len(right):.2f}" for right in rights)
    expected = ", ".join(f"{gain:.2f} with {count} tokens" for count, gain in predicted)
    name = f"strength {strength:g}"
    print(f"{name}: {times_ns[1] / 1e6:.2f} ms a drafted token; {summary([*pairs.values()])}")
    print(f"{name}: acceptance {acceptance}; predicted {expected}")
    show(f"{name}: gain", gains, "")
    ratios = [gain / best for gain, (_, best) in zip(gains, predicted, strict=True)]
    show(f"{name}: gain / prediction", ratios, "0.85 .. 1.15")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--type", choices=[quant_type.name for quant_type in LAYOUTS], default="Q4_K")
    parser.add_argument("--layers", type=positive, default=4, help="of the draft model; %(default)s by default")
    parser.add_argument("--strengths", type=listed(float), default=[0.0, 0.1, 0.3])
    parser.add_argument("--tokens", type=positive, default=260, help="of each answer; %(default)s by default")
    parser.add_argument("--repeats", type=positive, default=5, help="pairs; %(default)s by default")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    given = parse()
    print(machine(given.threads), f"seed {given.seed}", sep=", ")
    for strength in given.strengths:
        with folder() as place:
            pair_of = write_pair(place, SHAPES[given.shape], QuantType[given.type], given.layers, strength)
            asyncio.run(measure(pair_of, strength, given))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
