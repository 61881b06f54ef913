"""Tests the bounds of the default context by model and cluster file, and the record of the chosen context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import observations
from llamaclust.cluster.control.limits import context_bounds
from llamaclust.cluster.control.notices import kv_memory_text
from llamaclust.cluster.control.reconcile import Interrupt, LoadEpoch, Wait
from llamaclust.cluster.planner.context import ContextBound, ContextBounds, ContextChoice
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from support.plans.observed_cluster import BOTH, ONLY_A, Cluster

BASE: dict[str, Any] = {"trained": 131_072, "short": None, "is_causal": True, "window": None}


def bounds(keys: dict[str, Any] | None = None, **model: Any) -> ContextBounds:
    of = BASE | model
    fake: Any = SimpleNamespace(
        hyperparameters=SimpleNamespace(context_length=of["trained"], embedding_length=64),
        short_rope_context=of["short"],
        is_causal=of["is_causal"],
        window=of["window"],
        projector=None,
    )
    config = ClusterConfig.model_validate({"model": "m", "workers": [{"name": "a"}]} | (keys or {}))
    return context_bounds(config, fake)


def test_the_default_is_between_4096_tokens_and_the_models_own() -> None:
    assert bounds() == ContextBounds(4096, 131_072, 131_072, ContextBound.MODEL)
    assert bounds(trained=2048) == ContextBounds(2048, 2048, 2048, ContextBound.MODEL)
    assert bounds(trained=10 << 20).most == 1 << 20
    assert bounds({"context_length": "auto"}) == bounds()


def test_the_key_is_obeyed() -> None:
    assert bounds({"context_length": 100}) == ContextBounds(100, 100, 131_072, ContextBound.KEY)
    with pytest.raises(UsageError, match="context_length is 9000, but the model was trained for 8192 tokens"):
        bounds({"context_length": 9000}, trained=8192)


@pytest.mark.parametrize("short", [4096, 8192, 65_536])
def test_the_default_never_takes_the_rope_factors_of_long_contexts(short: int) -> None:
    """Otherwise the memory of the machines would decide about tokens."""
    assert bounds(short=short) == ContextBounds(4096, short, 131_072, ContextBound.ROPE)


def test_encoders_and_kv_on_disk_bound_the_default() -> None:
    assert bounds(is_causal=False, trained=8192) == ContextBounds(4096, 4096, 8192, ContextBound.ENCODER)
    assert bounds(is_causal=False, trained=1 << 20).longest_key < 1 << 20, "a batch is limited"
    on_disk = {"workers": [{"name": "a", "kv_disk": "1GiB"}]}
    assert bounds(on_disk) == bounds()
    with_window = bounds(on_disk, window=4096)
    assert with_window.bound is ContextBound.KV_DISK and 4096 < with_window.most < 8192


def test_each_of_several_models_has_its_own_key_or_the_default() -> None:
    entries = [{"model": "m"}, {"model": "n", "context_length": 512}, {"model": "o", "context_length": "auto"}]
    values = {"models": entries, "workers": [{"name": "a"}]}
    config = ClusterConfig.model_validate(values)
    assert [own.context_length for own in config.of_each_model()] == [None, 512, None]
    config = ClusterConfig.model_validate(values | {"context_length": 2048})
    assert [own.context_length for own in config.of_each_model()] == [2048, 512, 2048]


async def test_the_next_coordinator_finds_the_context_lengths(tmp_path: Path) -> None:
    path = tmp_path / "control"
    record = ControlRecord.begin(path)
    assert record.contexts == {}
    await record.keep_contexts({"a": 32_768, "b": 512})
    await record.drain(frozenset({"w"}))
    again = ControlRecord.begin(path)
    assert (again.contexts, again.drained) == ({"a": 32_768, "b": 512}, frozenset({"w"}))


def test_less_kv_memory_than_a_context_is_said_once() -> None:
    whole: Any = SimpleNamespace(lacks_kv_memory=False, context_length=8192, kv_blocks=512)
    short: Any = SimpleNamespace(lacks_kv_memory=True, context_length=8192, kv_blocks=300)
    assert kv_memory_text(None, whole) is kv_memory_text(whole, whole) is kv_memory_text(short, short) is None
    assert "KV memory holds 4800 of the context's 8192 tokens" in str(kv_memory_text(whole, short))
    assert kv_memory_text(short, whole)


def test_layers_move_for_a_whole_context_even_if_both_epochs_do_not_fit_together() -> None:
    bounds_of = ContextBounds(1024, 8192, 8192)
    short, whole = (
        replace(plan, context=ContextChoice(8192, bounds_of), kv_blocks=blocks)
        for plan, blocks in ((ONLY_A, 100), (BOTH, 512))
    )
    cluster = Cluster.serving()
    cluster.see(observations.WorkerLost("b"))
    cluster.lose_pipeline()
    assert cluster.plan(short) == LoadEpoch(short, is_exclusive=True)
    cluster.see(observations.Signal.EPOCH_LOADED, observations.Signal.EPOCH_SERVING)
    assert isinstance(cluster.plan(replace(short, kv_blocks=110)), Wait)
    cluster.see(observations.WorkerSeen("b", 3))
    assert cluster.plan(whole) == LoadEpoch(whole, is_exclusive=False)
    lacking = InsufficientMemoryError("both do not fit")
    assert cluster.load_failed(lacking, is_exclusive=False) == Interrupt(lacking)
