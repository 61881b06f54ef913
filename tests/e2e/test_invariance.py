"""Tests promise 1 on tiny models, pairwise over splits, threads, other requests, chunks, cache, preemption, feature
levels, tiles and models. Some models have every weight type."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamaclust.kernels import _native
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.kv_type import KvType
from llamaclust.model.quant_types import QuantType
from support.clusters.invariance import Answer, Way, check_answers, make_work, run
from support.models.tiny_model import build_tiny_model, every_type

VOCABULARY = 320
KV_HEADS, HEAD_DIM = 2, 32
SEED = 20
ROWS_SEED = 57  # Of the first 150 seeds, this one gives the fastest rows. The generic level is slow.
CUTS = ((0, 6), (0, 3, 6), (0, 1, 5, 6), (0, 1, 2, 3, 5, 6))  # test_random_ways tests other splits.


@dataclass(frozen=True, slots=True)
class Kind:
    architecture: str
    quant_type: QuantType | None  # If None, matrices have all types in turn.
    experts: int = 0
    first_type: int = 0

    def __str__(self) -> str:
        kind = "every_type" if self.quant_type is None else self.quant_type.name
        return f"{self.architecture}-{kind}{'-moe' if self.experts else ''}"

    @property
    def other_types(self) -> dict[str, QuantType]:
        return every_type(self.first_type) if self.quant_type is None else {}


KINDS = (
    Kind("llama", None),
    Kind("llama", QuantType.Q4_K),
    Kind("llama", QuantType.Q4_1),
    Kind("llama", None, experts=4, first_type=8),
    Kind("qwen2", None, first_type=16),
)
FACTORS: dict[str, tuple[Any, ...]] = {
    "cut": CUTS,
    "kind": KINDS,
    "feature_level": tuple(_native.available_levels()),
    "prefill_chunk": (1, 7, 64, 2048),
    "threads": (1, 2, 3),
    "company": (False, True),
    "cached": (False, True),
    "preempted": (False, True),
    "kv_type": tuple(KvType),
    "drafted": (False, True),
    "wide_tiles": (False, True),
    "shares": ((), (1, 1), (2, 1), (5, 3, 2)),
}


def pairwise_rows(factors: dict[str, tuple[Any, ...]], seed: int) -> list[dict[str, Any]]:
    """Returns rows in which each pair of values of two factors occurs. Greedily takes the best of 200 random rows each
    time."""
    source = random.Random(seed)
    names = list(factors)
    pairs = {
        frozenset({(a, i), (b, j)})
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }

    def met(row: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
        return {frozenset(pair) for pair in combinations(row.items(), 2)} & pairs

    rows = []
    while pairs:
        fixed = dict(min(pairs, key=sorted))
        tries = [{n: source.randrange(len(factors[n])) for n in names} | fixed for _ in range(200)]
        best = max(tries, key=lambda row: len(met(row)))
        pairs -= met(best)
        rows.append({name: factors[name][index] for name, index in best.items()})
    return rows


Models = Callable[[Kind, KvType], tuple[Path, list[Answer]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Returns a function that builds a model of a kind, and computes its answers on one undisturbed worker."""
    made: dict[tuple[Kind, KvType], tuple[Path, list[Answer]]] = {}

    def get(kind: Kind, kv_type: KvType) -> tuple[Path, list[Answer]]:
        if (kind, kv_type) not in made:
            folder = tmp_path_factory.mktemp("model")
            model = build_tiny_model(
                folder / f"{kind}.gguf",
                architecture=kind.architecture,
                quant_type=kind.quant_type or QuantType.F16,
                experts=kind.experts,
                ffn=256,
                vocabulary=VOCABULARY,
                other_types=kind.other_types,
            )
            with pytest.MonkeyPatch.context() as patch:
                work = make_work(SEED, VOCABULARY, KV_HEADS, HEAD_DIM)
                way = Way((0, 6), kv_type=kv_type, every=True)
                made[kind, kv_type] = model, run(model, way, work, folder, patch)
        return made[kind, kv_type]

    return get


def show(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items()).replace(", ", "-")


@pytest.mark.parametrize("row", pairwise_rows(FACTORS, ROWS_SEED), ids=show)
def test_every_pair_of_ways(
    row: dict[str, Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = models(row["kind"], row["kv_type"])
    way = Way(**{name: value for name, value in row.items() if name != "kind"})
    work = make_work(SEED, VOCABULARY, KV_HEADS, HEAD_DIM)
    answers = run(model, way, work, tmp_path, monkeypatch, expected)
    check_answers(answers, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.quant_type is None], ids=str)
def test_a_model_of_every_type_has_them_all(kind: Kind, models: Models) -> None:
    path, _ = models(kind, KvType.F16)
    assert {tensor.quant_type for tensor in open_model(path).tensors.values()} == set(SUPPORTED_TYPES)


def test_answers_are_worth_comparing(models: Models) -> None:
    """Different requests give different answers, ids and probabilities vary, and the KV type has an effect."""
    _, answers = models(KINDS[0], KvType.F16)
    greedy, seeded, scored, *_ = answers
    assert len(greedy) == len(seeded) == 12
    assert len(scored) == 69 + 2
    for answer in answers:
        assert len({token for token, _ in answer}) > 1
        assert len({bits for _, bits in answer}) > len(answer) // 2
    assert all(a != b for a, b in zip(answers, models(KINDS[0], KvType.Q8_0)[1], strict=True))


ways = st.builds(
    Way,
    cut=st.lists(st.integers(1, 5), unique=True, max_size=3).map(lambda inner: (0, *sorted(inner), 6)),
    threads=st.integers(1, 3),
    company=st.booleans(),
    prefill_chunk=st.none() | st.integers(1, 600),
    cached=st.booleans(),
    preempted=st.booleans(),
    feature_level=st.sampled_from(tuple(_native.available_levels())),
    kv_type=st.sampled_from(KvType),
    shares=st.just(()) | st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple),
)


@pytest.mark.promise
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(way=ways)
def test_random_ways(way: Way, models: Models, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, expected = models(KINDS[1], way.kv_type)
    with pytest.MonkeyPatch.context() as patch:
        work = make_work(SEED, VOCABULARY, KV_HEADS, HEAD_DIM)
        answers = run(model, way, work, tmp_path_factory.mktemp("way"), patch)
        check_answers(answers, expected)
