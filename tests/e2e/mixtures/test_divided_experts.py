"""Tests of layers whose experts are on several workers: the bits are those of one worker for any split and chunks, and
after lost workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest

from llamaclust.core.errors import UsageError
from llamaclust.kernels._native import available_levels
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.model.loader import Model
from llamaclust.model.program import Moe
from support.arithmetic.backends import BACKENDS, all_threads
from support.arithmetic.batches import LIMITS, Chain, possible_cuts
from support.arithmetic.disturbed import disturbed, undisturbed
from support.clusters.invariance import Way, check_answers, make_work, run
from support.clusters.recovering import config, generations, recovering
from support.clusters.recovering import undisturbed as undisturbed_answers
from support.models.tiny_architectures import MODELS, TOKENS, build_architecture
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

FAMILIES = tuple(name for name, tiny in MODELS.items() if tiny.experts)
DISTURBED = ("llama-experts", "qwen2moe", "gpt-oss-mxfp4", "bailingmoe2", "gemma4-experts", "llama4", "nemotron_h_moe")
"""Families with biases, shared experts with and without gates, expert groups, clamped SwiGLU, fused experts, weighted
inputs, and experts without a gate."""


ALWAYS = ("reference", f"cpu-{available_levels()[-1]}")
PAIRS = [
    (name, backend)
    for (family, name), (way, backend) in product(enumerate(FAMILIES), enumerate(BACKENDS))
    if backend in ALWAYS or (family + way + SEED) % 2
]
"""Pairs of family and backend. Most backends run every second family, which depends on the seed."""


@cache
def opened(folder: Path, name: str) -> Model:
    return Model.open(build_architecture(folder / f"{name}.gguf", name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("divided")


def mixtures(model: Model) -> dict[int, Moe]:
    steps = model.program(0, model.layer_count).steps
    return {int(step.router.split(".")[1]): step for step in steps if isinstance(step, Moe)}


def random_cut(model: Model, source: Random) -> tuple[int, tuple[int, ...]]:
    """Returns the number of shards per mixture, and up to three borders. At least one border is inside a mixture."""
    found = mixtures(model)
    shards = source.randint(2, max(mixture.experts for mixture in found.values()))
    possible = possible_cuts(model, range(1, model.layer_count * shards), shards)
    inside = [part for part in possible if part % shards]
    others = source.sample(possible, min(len(possible), source.randint(0, 2)))
    return shards, tuple(sorted({source.choice(inside), *others}))


def logits(
    backend: Backend, model: Model, name: str, chunk: int | None, shards: int = 1, cuts: Iterable[int] = ()
) -> Float32:
    limits = replace(LIMITS, max_context_tokens=MODELS[name].context, expert_shards=shards)
    chain = Chain(backend, model, tuple(cuts), limits)
    try:
        return chain.logits(TOKENS, chunk)
    finally:
        chain.close()


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_any_shards_and_chunks_give_the_same_bits(folder: Path, name: str, backend: str) -> None:
    """Each pair of family and backend runs one of three chunk sizes."""
    model, source, computing = opened(folder, name), Random(f"{SEED} {name} {backend}"), BACKENDS[backend]()
    whole = logits(computing, model, name, None)
    chunk = (None, 1, source.randint(2, 9))[(FAMILIES.index(name) + list(BACKENDS).index(backend)) % 3]
    shards, cuts = random_cut(model, source)
    found = logits(computing, model, name, chunk, shards, cuts)
    what = f"seed {SEED}: {shards} shards, cuts {cuts}, chunks of {chunk}"
    np.testing.assert_array_equal(found.view(np.uint32), whole.view(np.uint32), what)


@pytest.mark.parametrize("name", DISTURBED)
def test_disturbances_change_no_bit(folder: Path, name: str) -> None:
    """Two stages are lost during answers. The next stages divide other layers."""
    model, context, source = opened(folder, name), MODELS[name].context, Random(f"{SEED} {name}")
    ways = random_cut(model, source), random_cut(model, source)
    print(f"seed {SEED}: {ways}")
    expected = undisturbed(all_threads(1), model, context)
    assert disturbed(all_threads(2), model, context, expected, ways) == expected


@pytest.mark.parametrize("name", ["gpt-oss", "glm4moe", "llama-experts"])
def test_parts_of_a_layer_have_its_weights_between_them(folder: Path, name: str) -> None:
    """The parts of a layer together have as many bytes as the whole layer. Only biases take more memory, because they
    are held in tiles."""
    model = opened(folder, name)
    layer, mixture = max(mixtures(model).items())
    whole = model.tensors_for(model.program(layer, layer + 1))
    for shards in range(2, mixture.experts + 1):
        parts = [
            model.program(layer * shards + part, layer * shards + part + 1, expert_shards=shards)
            for part in range(shards)
        ]
        held = [tensor for part in parts for tensor in model.tensors_for(part).values()]
        assert sum(tensor.n_bytes for tensor in held) == sum(tensor.n_bytes for tensor in whole.values())
        matrices = [tensor.resident_bytes for tensor in held if len(tensor.shape) == 3]
        assert sum(matrices) == sum(tensor.resident_bytes for tensor in whole.values() if len(tensor.shape) == 3)


def test_layers_without_experts_are_not_divided(folder: Path) -> None:
    model = opened(folder, "glm4moe")
    dense = next(layer for layer in range(model.layer_count) if layer not in mixtures(model))
    with pytest.raises(UsageError, match=f"layer {dense} has no experts"):
        model.program(0, 2 * dense + 1, expert_shards=2)
    layer, mixture = max(mixtures(model).items())
    many = mixture.experts + 1
    with pytest.raises(UsageError, match=f"layer {layer} has {mixture.experts} experts, too few for {many} shards"):
        model.program(0, many * layer + 1, expert_shards=many)


@pytest.mark.parametrize("cut", [(0, 2.5, 6), (0, 0.25, 3.75, 4.5, 6), (0, 1.25, 1.5, 1.75, 6)])
def test_processes_with_parts_of_layers(
    cut: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is in the cluster file. In the last plan, two workers hold only experts."""
    model = build_tiny_model(tmp_path / "moe.gguf", experts=4, ffn=256)
    work = make_work(SEED % 1000, 320, 2, 32)
    expected = run(model, Way((0, 6), every=True), work, tmp_path, monkeypatch)
    check_answers(run(model, Way(cut, company=True, prefill_chunk=7), work, tmp_path, monkeypatch), expected)


async def test_a_killed_worker_with_parts_of_layers_costs_a_pause(tmp_path: Path) -> None:
    """The killed worker's layers begin and end inside mixtures."""
    model = build_tiny_model(tmp_path / "moe.gguf", experts=4, ffn=256)
    requests = generations(SEED % 1000)
    expected = await asyncio.to_thread(undisturbed_answers, model, requests)
    places = {"a": [0, 1.25], "b": [1.25, 3.75], "c": [3.75, 6]}
    plan = [{"worker": name, "layers": layers} for name, layers in places.items()]
    async with recovering(config(model, tmp_path, plan=plan, timeouts={"worker": "60s"})) as cluster:
        tasks = cluster.start(requests)
        await cluster.token(Random(SEED).randrange(1, 200))
        cluster.hurt("b")
        assert await asyncio.gather(*tasks) == expected
        assert any("worker b (layers [1.25, 3.75)) is lost" in text for text in cluster.told), cluster.told
        await cluster.whole()
