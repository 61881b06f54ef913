"""Checks that costs of group members equal those of their programs, in every family and for any shares."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.kernels.gathers import gather_formats, packed_width
from llamaclust.model.costs import LayerCost, is_before_head, layer_cost, steps_cost, weight_bytes
from llamaclust.model.groups.costs import GatherCost
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.model.quant_types import TILE_ROWS, ActivationFormat, QuantType
from llamaclust.model.steps.across import Gather
from support.models.tiny_architectures import MODELS, build_architecture
from support.models.tiny_model import build_tiny_model

SHARES = ((1, 1), (2, 1), (5, 3, 2))


def assert_same(model: Model, found: LayerCost, program: Program) -> None:
    """Asserts equal costs except for expert bytes, rounded per portion, and for matrices that end within a tile of rows
    (wider models have none)."""
    tensors = model.tensors_for(program)
    wanted = layer_cost(tensors, program)
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    tiles = [replace(tensor, shape=(1, tensor.shape[-1])) for tensor in matrices if tensor.shape[-2] % TILE_ROWS]
    slack = sum(tile.resident_bytes for tile in tiles)
    most = {"weight_bytes": slack, "expert_bytes": slack, "idle_bytes": 8, "used_file_bytes": 8}
    for field in fields(LayerCost):
        figures = [getattr(cost, field.name) for cost in (found, wanted)]
        if field.name in most:
            assert abs(figures[0] - figures[1]) <= most[field.name], field
        elif "weights" in field.name:
            kinds = [[(each.quant_type, each.macs) for each in weights] for weights in figures]
            assert kinds[0] == kinds[1]
        else:
            assert figures[0] == figures[1], field


def head_of(model: Model, program: Program) -> LayerCost:
    steps = list(program.steps)
    before = [step for step in steps if is_before_head(program, step)]
    head = tuple(steps[steps.index(next(step for step in steps if step not in before)) :])
    return steps_cost(model.tensors_for(program), replace(program, steps=head))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_members_costs_are_those_of_its_program(tmp_path: Path, name: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    drawn = tuple(random.Random(seed).randint(1, 9) for _ in range(3))
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        layers = [model.program(layer, layer + 1, KvType.Q8_0) for layer in range(model.layer_count)]
        for shares in (*SHARES, drawn):
            costs = model.group_costs(KvType.Q8_0, len(shares))
            for member in range(len(shares)):
                found = costs.member(shares, member)
                programs = [divide(layer, shares, member) for layer in layers]
                for layer, cost in zip(programs, found.layers, strict=True):
                    assert_same(model, cost, layer)
                head = head_of(model, programs[-1])
                assert (found.head_bytes, found.head_macs) == (head.weight_bytes, head.macs_per_token)
                embedding = [step for step in programs[0].steps if step.is_embedding]
                assert found.embedding_bytes == weight_bytes(model.tensors_for(programs[0]), embedding)


@pytest.mark.parametrize("kind", [QuantType.F16, QuantType.Q8_0])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_gathers_are_those_of_programs(tmp_path: Path, name: str, kind: QuantType) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name, kind)) as model:
        costs = model.group_costs(KvType.F16, 3)
        for number, layer in enumerate(costs.layers):
            program = divide(model.program(number, number + 1), (5, 3, 2), 0)
            gathers = [step for step in program.steps if isinstance(step, Gather)]
            first, last = costs.embedding.gathers if program.is_first else (), costs.head.gathers
            found = [*first, *layer.gathers, *(last if program.is_last else ())]
            figures = [(gather.lines, gather.lines * gather.width) for gather in found]
            assert figures == [(step.lines, step.out.width) for step in gathers]
            types = {name: tensor.quant_type for name, tensor in model.tensors_for(program).items()}
            own = [0 if step.x is None else step.x.width for step in gathers]
            formats = gather_formats(program, types)
            widths = [
                width if form is None else packed_width(width, form) for width, form in zip(own, formats, strict=True)
            ]
            assert [gather.sent_bytes((5, 3, 2))[0] for gather in found] == [4 * width for width in widths]
        assert [gather.to_leader for gather in costs.head.gathers] == [True] * bool(model.generates)
        assert all(gather.from_leader for gather in costs.embedding.gathers)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_tokens_are_the_leaders(tmp_path: Path, tied: bool) -> None:
    """Checks that the leader alone has the table; members hold their rows of a tied head."""
    path = build_tiny_model(tmp_path / "m.gguf", quant_type=QuantType.Q4_0, tied=tied)
    with Model.open(path) as model:
        whole, costs = model.costs(KvType.F16), model.group_costs(KvType.F16, 3)
        for member in range(3):
            program = divide(model.program(0, model.layer_count), (2, 1, 1), member)
            held = sum(tensor.resident_bytes for tensor in model.tensors_for(program).values())
            found = StageCosts.of(costs.member((2, 1, 1), member))
            assert found.weight_bytes(0, model.layer_count) == held
            assert found.model.embedding_bytes == (0 if member else whole.embedding_bytes)
            assert 0 < found.model.head_bytes < whole.head_bytes


def test_all_members_together_have_what_is_divided_once_and_the_rest_each(tmp_path: Path) -> None:
    with Model.open(build_tiny_model(tmp_path / "m.gguf", quant_type=QuantType.Q4_0, layers=3)) as model:
        whole, costs = model.costs(KvType.F16), model.group_costs(KvType.F16, 2)
        members = [costs.member((3, 1), member) for member in range(2)]
        assert len({*costs.layers}) == len({id(layer) for layer in costs.layers}) == 1
        for layer, divided in zip(whole.layers, costs.layers, strict=True):
            parts = [member.layers[0] for member in members]
            for name in ("weight_bytes", "macs_per_token", "kv_bytes_per_token", "used_file_bytes"):
                total = sum(getattr(part, name) for part in parts)
                assert total == getattr(layer, name) + getattr(divided.whole, name)
            assert divided.whole.touched_bytes(1) < 0.01 * sum(part.cost.touched_bytes(1) for part in divided.portions)
        assert members[0].head_bytes + members[1].head_bytes == whole.head_bytes + costs.head.whole.weight_bytes
        assert costs.member((1, 1), 1) == costs.member((5, 5), 1) == costs.of_follower(costs.member((5, 5), 0))
        assert {portion.units for portion in costs.layers[0].portions} == {2, 16}, "KV heads, 16 or 32 rows"


def test_bytes_of_gathers() -> None:
    assert GatherCost(4096, 256).sent_bytes((3, 1)) == (4 * 3072, 4 * 1024)
    narrow = GatherCost(4096, 256, lines=2, form=ActivationFormat.Q8_32)
    assert narrow.sent_bytes((3, 1)) == (2 * (3072 + 4 * 96), 2 * (1024 + 4 * 32))
    wide = GatherCost(4096, 256, form=ActivationFormat.Q8_256)
    assert wide.sent_bytes((3, 1)) == (3072 + 4 * 12, 1024 + 4 * 4)
    assert wide.sent_bytes((5, 4)) == (4 * 16 * 142, 4 * 16 * 114), "portions that end within a segment"
    assert GatherCost(256, 2).sent_bytes((3, 1)) == (512, 512), "no half units"
    assert GatherCost(256, 1, from_leader=True).sent_bytes((1, 2, 5)) == (1024, 0, 0)


@pytest.mark.parametrize(
    ("quant_type", "form"),
    [(QuantType.Q4_0, ActivationFormat.Q8_32), (QuantType.IQ1_S, ActivationFormat.Q8_256), (QuantType.F16, None)],
)
@pytest.mark.parametrize("experts", [0, 4])
def test_rows_travel_as_int8_where_products_quantize_them(
    tmp_path: Path, quant_type: QuantType, form: ActivationFormat | None, experts: int
) -> None:
    with Model.open(build_tiny_model(tmp_path / "m.gguf", quant_type=quant_type, experts=experts)) as model:
        layer, head = model.group_costs(KvType.F16, 2).layers[0], model.group_costs(KvType.F16, 2).head
    assert [gather.form for gather in layer.gathers] == [form, None, form, None], "norms and sums read the others"
    assert not any(gather.form for gather in head.gathers)
