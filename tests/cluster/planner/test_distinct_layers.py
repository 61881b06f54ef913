"""Checks that programs of distinct layers and their portions take the workspace of whole programs, in fewer steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda import backend
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.distinct_layers import distinct_layers
from llamaclust.model.groups.division import divide
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume.assumed_model import shape_model
from llamaclust.tools.assume.public_shapes import public_shapes
from llamaclust.tools.assume.shapes import SHAPES
from llamaclust.worker.devices.workspace import program_workspace_bytes
from support.models.tiny_architectures import MODELS, build_architecture

LIMITS = StageLimits(
    max_batch_tokens=96, max_outputs=16, max_sequences=8, max_context_tokens=4096, kv_blocks=300, window_blocks=1
)
NAMED = {**SHAPES, **public_shapes()}


def planned(model: Model, end: int) -> tuple[Program, dict[str, Weights]]:
    program = model.program(0, end, context_tokens=min(4096, model.hyperparameters.context_length))
    return program, backend._checked_weights(program, model.tensors_for(program))


def sizes(program: Program, weights: dict[str, Weights]) -> dict[object, int]:
    """Returns the sizes of the layout's buffers."""
    return Plan(program, weights, LIMITS)._layout._sizes


def check_cpu(model: Model, program: Program) -> None:
    """Checks the whole program, and portions of members if the model can be divided."""
    limits = replace(LIMITS, max_context_tokens=min(4096, model.hyperparameters.context_length))
    few = distinct_layers(program, model.tensors_for(program))
    pairs = [(few, program)]
    for shares, member in product(((1, 1), (3, 1)), (0, 1)):
        try:
            whole = divide(program, shares, member)
        except UsageError:
            break
        pairs.append((divide(few, shares, member), whole))
    for pair in pairs:
        found, wanted = (program_workspace_bytes(model, each, limits, 3, "cpu") for each in pair)
        assert found == wanted


@pytest.mark.parametrize("name", ["8b", "gpt-oss-20b", "glm-4.5-air", "qwen3.5-35b-a3b", "gemma-3-4b-it", "qwen3-4b"])
def test_public_shapes_take_the_same_buffers(name: str) -> None:
    model = shape_model(name, replace(NAMED[name], layers=16, has_nextn=False)).opened
    for end in (16, 15):
        program, weights = planned(model, end)
        few = distinct_layers(program, model.tensors_for(program))
        assert len(few.steps) < 0.7 * len(program.steps)
        assert sizes(few, weights) == sizes(program, weights)
        check_cpu(model, program)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_takes_the_same_buffers(name: str, tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "m.gguf", name)) as model:
        program, weights = planned(model, model.layer_count)
        few = distinct_layers(program, model.tensors_for(program))
        assert sizes(few, weights) == sizes(program, weights)
        check_cpu(model, program)
        assert set(few.steps) <= set(program.steps)


def test_layers_of_other_types_or_ends_are_kept() -> None:
    model = shape_model("8b", replace(SHAPES["8b"], layers=16)).opened
    program, weights = planned(model, 16)
    few = distinct_layers(program, model.tensors_for(program))

    def types(layers: set[str]) -> set[tuple[QuantType, ...]]:
        parts = ("ffn_down", "attn_v")
        return {tuple(weights[f"blk.{layer}.{part}.weight"].quant_type for part in parts) for layer in layers}

    kept = {name.split(".")[1] for name in few.weights if name.startswith("blk.")}
    everything = types(set(map(str, range(16))))
    assert types(kept) == everything and len(everything) > 1 and len(kept) < 16
    assert few.steps[0] == program.steps[0] and few.steps[-1] == program.steps[-1]
