"""Compares the workspace that plans promise with what loaded stages take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from weakref import ref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import stage_memory
from llamaclust.cluster.control.limits import plan_limits
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.control.stage_memory import workspace_of
from llamaclust.cluster.planner.memory import StagePlace
from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cpu import compile as compile_module
from llamaclust.kernels.cpu.backend import CpuBackend, workspace_bytes
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Buffer, Program, Slice
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.stage.stage_runner import StageRunner, plan_memory
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

LAYERS = 3

SHAPES = st.fixed_dictionaries(
    {
        "architecture": st.sampled_from(["llama", "qwen2"]),
        "heads": st.sampled_from([4, 8]),
        "kv_heads": st.sampled_from([1, 2, 4]),
        "hidden": st.sampled_from([256, 512]),
        "ffn": st.sampled_from([256, 1024]),
        "experts": st.sampled_from([0, 0, 4]),
        "tied": st.booleans(),
        "quant_type": st.sampled_from([QuantType.F16, QuantType.Q4_0, QuantType.Q4_K]),
    }
)

MIXES: tuple[dict[str, QuantType], ...] = (
    {"attn_v": QuantType.F16},
    {"attn_q": QuantType.F16, "attn_k": QuantType.Q8_0},
    {"ffn_gate": QuantType.F16, "ffn_down": QuantType.Q6_K},
    {"output.": QuantType.F16, "token_embd": QuantType.Q8_0},
)

Open = Callable[..., Model]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    folder: Path = tmp_path_factory.mktemp("shapes")

    @cache
    def open_model(mix: int | None, **shape: object) -> Model:
        name = "-".join(str(value) for value in (mix, *shape.values()))
        classes: dict[str, object] = {**shape, "experts": shape["experts"] if shape["architecture"] == "llama" else 0}
        others = {} if mix is None else MIXES[mix]
        return Model.open(build_tiny_model(folder / f"{name}.gguf", layers=LAYERS, other_types=others, **classes))  # type: ignore[arg-type]

    return open_model


def taken(model: Model, start: int, end: int, limits: StageLimits, threads: int) -> int:
    """Returns the memory that the loaded stage takes; its worker must have expected the same."""
    backend = CpuBackend(threads)
    runner = StageRunner(backend, model, start, end, limits)
    runner.close()
    assert plan_memory(backend, model, start, end, limits).workspace_bytes == runner.memory.workspace_bytes
    return runner.memory.workspace_bytes


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    mix=st.sampled_from([None, None, *range(len(MIXES))]),
    tokens=st.integers(1, 600),
    outputs=st.integers(1, 200),
    context=st.integers(1, 2048),
    threads=st.integers(1, 4),
    stage=st.sampled_from([(0, LAYERS), (0, 1), (1, 2), (2, LAYERS)]),
)
def test_the_promise_is_what_a_loaded_stage_takes(
    opened: Open,
    shape: dict[str, object],
    mix: int | None,
    tokens: int,
    outputs: int,
    context: int,
    threads: int,
    stage: tuple[int, int],
) -> None:
    model, limits = opened(mix, **shape), StageLimits(tokens, min(outputs, tokens), 1, context, 8)
    place = StagePlace(threads, context, stage[1] == LAYERS)
    assert workspace_of(model, limits)(place) == taken(model, *stage, limits, threads)


def test_layers_of_other_types_make_the_promise_a_little_larger(tmp_path: Path) -> None:
    """Float weights in the first layer need room for activations that the other layers do not."""
    path = build_tiny_model(
        tmp_path / "m.gguf", layers=3, quant_type=QuantType.Q4_K, other_types={"blk.0.": QuantType.F16}
    )
    with Model.open(path) as model:
        limits = StageLimits(544, 64, 32, 1024, 8)
        promised = workspace_of(model, limits)(StagePlace(2, 1024, False))
        stages = [taken(model, start, start + 1, limits, 2) for start in (0, 1)]
    assert stages[1] < stages[0] <= promised <= 1.1 * stages[1]


PLANNED = ("ernie4_5-moe", "glm4moe", "bailingmoe2", "deepseek2", "cohere2", "types")
"""Models whose layers differ: some have experts, a window or other types."""


def differing_layers(path: Path, name: str) -> Path:
    if name == "types":
        return build_tiny_model(path, quant_type=QuantType.Q4_K, other_types={"blk.0.": QuantType.F16}, layers=4)
    return build_architecture(path, name)


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_names_what_each_stage_takes(tmp_path: Path, name: str) -> None:
    path, names = differing_layers(tmp_path / "m.gguf", name), ("a", "b")
    resources = ClusterResources({name: WorkerResources("m", 1 << 40, threads=2) for name in names}, {})
    with Model.open(path) as model:
        for cut in range(1, model.layer_count):
            bounds = ((0, cut), (cut, model.layer_count))
            entries = [{"worker": worker, "layers": span} for worker, span in zip(names, bounds, strict=True)]
            keys = {"model": str(path), "workers": [{"name": worker} for worker in names], "plan": entries}
            config = ClusterConfig.model_validate(keys | {"context_length": 512})
            plan = plan_cluster(config, model, resources)
            limits = plan_limits(config, plan)
            for stage in plan.stages:
                runner = StageRunner(CpuBackend(2), model, stage.start, stage.end, limits)
                runner.close()
                assert stage.bytes == runner.memory.total_bytes, (cut, stage.start)


def test_a_model_that_cannot_be_computed_is_named(tmp_path: Path) -> None:
    path = build_tiny_model(
        tmp_path / "m.gguf", layers=1, quant_type=QuantType.F32, other_types={"attn_v": QuantType.F16}
    )
    with Model.open(path) as model, pytest.raises(ModelFileError, match=r"layers 0 to 1 cannot be computed: program: "):
        workspace_of(model, StageLimits(8, 8, 1, 1024, 8))(StagePlace(1, 1 << 30, True))


def test_numbers_beyond_the_native_modules_are_named() -> None:
    limits, program = StageLimits(8, 8, 1, 1024, 8), Program(0, 1, 1, Buffer("hidden", 64), Buffer("hidden", 64), ())
    for changed, what in [
        (
            replace(program, out=Buffer("hidden", 1 << 31)),
            "Buffer has width = 2147483648, which exceeds the maximum of 2147483647",
        ),
        (
            replace(program, steps=(wide(),)),
            "Slice has out.width = 4294967296, which exceeds the maximum of 2147483647",
        ),
    ]:
        with pytest.raises(ModelFileError, match=f"layers 0 to 1 cannot be computed: {what}"):
            workspace_bytes(changed, {}, limits, 1)
    with pytest.raises(ModelFileError, match="StageLimits has kv_blocks = 3000000000"):
        workspace_bytes(program, {}, replace(limits, kv_blocks=3_000_000_000), 1)


def wide() -> Slice:
    return Slice(Buffer("hidden", 64), Buffer("wide", 1 << 32), 0)


def test_a_mistake_of_ours_does_not_blame_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake may be a native module that is older than its callers, for example."""

    def older(*limits: int) -> None:
        raise TypeError("7 arguments")

    monkeypatch.setattr(compile_module, "Plan", older)
    with Model.open(build_tiny_model(tmp_path / "m.gguf", layers=1)) as model, pytest.raises(TypeError, match="7 arg"):
        workspace_of(model, StageLimits(8, 8, 1, 1024, 8))(StagePlace(1, 1024, True))


def test_figures_of_an_open_model_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.open(build_tiny_model(tmp_path / "m.gguf"))
    computed: list[int] = []

    def counted(*given: object) -> int:
        computed.append(1)
        return 7 * len(computed)

    monkeypatch.setattr(stage_memory, "program_workspace_bytes", counted)
    place, limits = StagePlace(1, 64, is_last=True), StageLimits(544, 64, 32, 1024, 8)
    assert [workspace_of(model, limits)(place) for _ in range(3)] == [7, 7, 7]
    assert workspace_of(model, replace(limits, max_outputs=2))(place) == 14
    assert workspace_of(Model(model.file), limits)(place) == 21
    assert model.costs(KvType.F16) is model.costs(KvType.F16) is not model.costs(KvType.Q8_0)
    kept = ref(model)
    del model
    gc.collect()
    assert kept() is None, "what is remembered does not keep it"
