"""Gain and cost of a head for multi-token prediction (MTP): random weights, and a head that is right by construction,
or wrong.

    python benchmarks/speculation/mtp.py [--layers 16] [--hidden 2048] [--stages 1,2] [--heads right,wrong]

The model has GLM 4.5's architecture without experts. Its layers are computed, but add nothing to the hidden state: so
each token follows from the one before it alone. A head that hands on the embedding of the token that it reads is right
about all tokens that are chosen greedily; with the sign of that changed, about none. Answers of an engine without the
head and of one with it take turns, and must have the same tokens and logprobs; nothing is drafted from n-grams. The
cost in prefill is the time of a prompt relative to that without the head, and beside it the share of layers that is
added.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring.lines import show
from measuring.options import chosen, listed, positive
from public_shape import sources_of
from recorded import NoDrafters
from row_costs import machine
from shape import tokenizer
from turns import Pair, Served, answer, check_same, served, summary

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume.assumed_model import shape_model
from llamaclust.tools.assume.shapes import SHAPES, ModelShape

HEADS = {"right": 1, "wrong": -1}
"""The sign of what a head hands on."""
_ADDING = ("attn_output.weight", "ffn_down.weight")
"""Matrices whose products are added to the hidden state."""
_OWN = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
"""Of a head, in place of those of the model: left out, so that it has the model's."""


def shape_of(layers: int, hidden: int, vocabulary: int) -> ModelShape:
    own = SHAPES["glm-4.5-air"]
    keys = {**own.keys, "leading_dense_block_count": layers + 1}
    sizes = {"layers": layers, "leading_layers": layers + 1, "hidden": hidden, "ffn": 11 * hidden // 4}
    heads = {"heads": max(hidden // own.head_dim, 1), "kv_heads": max(hidden // own.head_dim // 4, 1)}
    return replace(own, **sizes, **heads, vocabulary=vocabulary, context=8192, keys=keys)  # type: ignore[arg-type]


def write_model(path: Path, shape: ModelShape, sign: int, seed: int) -> None:
    file = shape_model("mtp", shape, "Q4_K_M").file
    write_gguf(
        path,
        {**file.metadata, **tokenizer(shape.vocabulary), "general.quantization_version": 2},
        (_constructed(source, sign) for source in sources_of(file, seed) if not source.name.endswith(_OWN)),
    )


def _constructed(source: TensorSource, sign: int) -> TensorSource:
    if source.name.endswith(_ADDING):
        return replace(source, produce=lambda: memoryview(bytes(source.n_bytes)))
    if source.name.endswith("nextn.eh_proj.weight"):
        rows, columns = source.shape
        handing_on = _first_inputs(rows, columns, sign)
        return TensorSource(source.name, QuantType.Q8_0, source.shape, lambda: handing_on)
    return source


def _first_inputs(rows: int, columns: int, sign: int) -> memoryview:
    """A matrix in Q8_0 whose products are its first inputs: [rows, columns]."""
    blocks = np.zeros((rows, columns // 32, 34), np.uint8)
    row = np.arange(rows)
    blocks[row, row // 32, :2] = np.array([sign / 127], np.float16).view(np.uint8)
    blocks[row, row // 32, 2 + row % 32] = 127
    return blocks.data


async def pairs_of(plain: Served, drafting: Served, given: argparse.Namespace) -> list[Pair]:
    """One prompt a pair; the first pair, from which schedulers learn, does not count."""
    draw, pairs = random.Random(given.seed), list[Pair]()
    for turn in range(given.repeats + 1):
        prompt = tuple(draw.randrange(3, plain.vocabulary) for _ in range(given.prompt))
        request, engines = GenerationRequest(f"mtp-{turn}", prompt, given.tokens), [plain.engine, drafting.engine]
        both = [await answer(engine, request) for engine in (engines if turn % 2 else engines[::-1])]
        pairs.append(Pair(*(both if turn % 2 else both[::-1])))
        check_same(pairs[-1].plain, pairs[-1].drafted)
    return pairs[1:]


async def measure(path: Path, stages: int, given: argparse.Namespace) -> Sequence[Pair]:
    async with AsyncExitStack() as opened:
        plain, drafting = [
            await opened.enter_async_context(served(path, stages, given.threads, NoDrafters(), mtp=mtp))
            for mtp in (False, True)
        ]
        return await pairs_of(plain, drafting, given)


def written(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    shape = shape_of(given.layers, given.hidden, given.vocabulary)
    for name, sign in HEADS.items():
        if sign in given.heads:
            write_model(path := folder / f"{name}.gguf", shape, sign, given.seed)
            yield name, path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=16, help="beside the head; %(default)s by default")
    parser.add_argument("--hidden", type=positive, default=2048, help="channels; %(default)s by default")
    parser.add_argument("--vocabulary", type=positive, default=32000)
    parser.add_argument(
        "--heads", type=listed(chosen("head", HEADS)), default=[1, -1], help="right, wrong or both, the default"
    )
    parser.add_argument("--stages", type=listed(positive), default=[1, 2], help="several: workers of one thread each")
    parser.add_argument("--prompt", type=positive, default=256, help="tokens of each prompt; %(default)s by default")
    parser.add_argument("--tokens", type=positive, default=200, help="of each answer; %(default)s by default")
    parser.add_argument("--repeats", type=positive, default=7, help="pairs; %(default)s by default")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    given = parse()
    print(machine(given.threads), f"seed {given.seed}", sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in written(given, Path(folder)):
            print(f"{name}: {given.layers} layers and a head, {path.stat().st_size / 1e6:.0f} MB", flush=True)
            for stages in given.stages:
                pairs, what = asyncio.run(measure(path, stages, given)), f"{name}, stages {stages}"
                print(f"{what}: {summary(pairs)}")
                show(f"{what}: gain", [each.gain for each in pairs], "")
                prefills = [each.drafted.ttft_ms / each.plain.ttft_ms for each in pairs]
                show(f"{what}: time of the prompt", prefills, f"{1 + 1 / given.layers:.3f}")


if __name__ == "__main__":
    with ends_in_one_line():
        main()
