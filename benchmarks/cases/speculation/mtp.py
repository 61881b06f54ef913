from __future__ import annotations

import os
import random
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from public_shape import sources_of
from runner.case import Case, Group, Measures, option
from runner.drafted import NoDrafters, Served, measured, served
from runner.models import ADDING
from runner.options import chosen, listed, positive
from shape import tokenizer

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume.assumed_model import shape_model
from llamaclust.tools.assume.shapes import SHAPES, ModelShape

HEADS = {"right": 1, "wrong": -1}
"""The sign of the output of the multi-token prediction head, for each kind of head."""
_OWN = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
"""Tensors that are absent from the file, because the head uses the model's tensors instead."""


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
    if source.name.endswith(ADDING):
        return replace(source, produce=lambda: memoryview(bytes(source.n_bytes)))
    if source.name.endswith("nextn.eh_proj.weight"):
        rows, columns = source.shape
        handing_on = _first_inputs(rows, columns, sign)
        return TensorSource(source.name, QuantType.Q8_0, source.shape, lambda: handing_on)
    return source


def _first_inputs(rows: int, columns: int, sign: int) -> memoryview:
    """Returns a Q8_0 matrix [rows, columns]. Its product with a vector is `sign` times the vector's first values."""
    blocks = np.zeros((rows, columns // 32, 34), np.uint8)
    row = np.arange(rows)
    blocks[row, row // 32, :2] = np.array([sign / 127], np.float16).view(np.uint8)
    blocks[row, row // 32, 2 + row % 32] = 127
    return blocks.data


@dataclass(frozen=True)
class Mtp(Case):
    """Measures gain and cost of a multi-token prediction head that is always right, or always wrong.
    Weights are random. The model has GLM 4.5's architecture without experts. Its layers add nothing to the hidden
    state, so that each token follows from the previous token. The right head passes its input's embedding on, and the
    wrong head passes the negated embedding on. `prompt ms` shows the cost in prefill, because the head is an additional
    layer."""

    rounds = 7
    warm = 1
    layers: int = option(16, "number of layers without the head", positive)
    hidden: int = option(2048, "width in channels", positive)
    vocabulary: int = option(32000, "number of words in the vocabulary", positive)
    heads: tuple[str, ...] = option(
        (*HEADS,), "kinds of heads: right, wrong", listed(chosen("head", {head: head for head in HEADS}))
    )
    stages: tuple[int, ...] = option(
        (1, 2), "numbers of stages: one runs in this process, several run in one-thread workers", listed(positive)
    )
    prompt: int = option(256, "number of tokens in a prompt", positive)
    tokens: int = option(200, "number of tokens in an answer", positive)
    threads: int = option(os.cpu_count() or 1, "number of threads of a stage in this process", positive)
    seed: int = option(1, "seed of weights and prompts")

    async def groups(self) -> AsyncIterator[Group]:
        shape = shape_of(self.layers, self.hidden, self.vocabulary)
        goals = {"tok/s": "", "prompt ms": f"{1 + 1 / self.layers:.3f}"}
        with tempfile.TemporaryDirectory() as folder:
            for head in self.heads:
                write_model(path := Path(folder) / f"{head}.gguf", shape, HEADS[head], self.seed)
                for stages in self.stages:
                    opened = partial(served, path, stages, self.threads, NoDrafters())
                    async with opened(mtp=False) as plain, opened(mtp=True) as drafting:
                        ways = {"plain": partial(self._measure, plain), "head": partial(self._measure, drafting)}
                        yield Group(f"{head}, {stages} stages", ways, goals)

    async def _measure(self, model: Served, turn: int) -> Measures:
        draw = random.Random(f"{self.seed} {turn}")
        prompt = tuple(draw.randrange(3, model.vocabulary) for _ in range(self.prompt))
        return await measured(model.engine, GenerationRequest(f"mtp-{turn}", prompt, self.tokens), plain=False)
