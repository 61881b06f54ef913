"""The planner's figures of a stage's memory beside what the CPU backend takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import build_tiny_model

from llamaclust.cluster.planner_workspace import ModelWorkspace
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.wire.control import StageLimits

SHAPES = st.fixed_dictionaries(
    {
        "architecture": st.sampled_from(["llama", "qwen2"]),
        "heads": st.sampled_from([4, 8]),
        "kv_heads": st.sampled_from([1, 2, 4]),
        "hidden": st.sampled_from([128, 256, 512]),
        "ffn": st.sampled_from([32, 256, 1024]),
        "vocabulary": st.sampled_from([320, 512]),
        "experts": st.sampled_from([0, 0, 4, 8]),
        "tied": st.booleans(),
        "rope_factors": st.booleans(),
    }
)

Open = Callable[..., Model]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    folder: Path = tmp_path_factory.mktemp("shapes")

    @cache
    def open_model(**shape: object) -> Model:
        name = "-".join(str(value) for value in shape.values())
        kinds: dict[str, object] = {**shape, "experts": shape["experts"] if shape["architecture"] == "llama" else 0}
        return Model.open(build_tiny_model(folder / f"{name}.gguf", layers=3, **kinds))  # type: ignore[arg-type]

    return open_model


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    tokens=st.integers(1, 2000),
    outputs=st.integers(1, 200),
    context=st.integers(1, 2048),
    threads=st.integers(1, 5),
    stage=st.sampled_from([(0, 3), (0, 1), (1, 2), (2, 3)]),
)
def test_workspace_is_what_the_backend_takes(
    opened: Open,
    shape: dict[str, object],
    tokens: int,
    outputs: int,
    context: int,
    threads: int,
    stage: tuple[int, int],
) -> None:
    model, outputs = opened(**shape), min(outputs, tokens)
    workspace = ModelWorkspace.of(model.program(0, 3), tokens, outputs)
    taken = CpuBackend(threads).workspace_bytes(model.program(*stage), StageLimits(tokens, outputs, 1, context, 8))
    place = workspace.last if stage[1] == 3 else workspace.inner
    assert place.bytes(threads, context) == taken


def test_attention_over_wide_groups_of_heads(opened: Open, tmp_path: Path) -> None:
    """More query heads on a KV head than a tile of attention takes at once."""
    with Model.open(build_tiny_model(tmp_path / "wide.gguf", hidden=2048, heads=128, kv_heads=1, layers=1)) as model:
        program = model.program(0, 1)
        taken = CpuBackend(2).workspace_bytes(program, StageLimits(64, 8, 1, 2048, 8))
        assert ModelWorkspace.of(program, 64, 8).last.bytes(2, 2048) == taken
