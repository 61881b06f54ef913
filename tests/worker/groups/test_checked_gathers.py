"""Tests that every member identifies the first one with non-finite numbers, at any gather and in any format."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from llamaclust.kernels._native import PythonGatherer
from llamaclust.kernels.backend import Batch, Float32, GathersRows
from llamaclust.kernels.gathers import bands_of, borders_in
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Gather, Program
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.groups.checked_gathers import checked_gathers
from support.arithmetic.batches import LIMITS, batch_of
from support.arithmetic.members import LinkedGroup
from support.models.tiny_architectures import TOKENS, build_architecture
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

SHARES = (2, 1, 1)
BANDS = 2  # initial bands of gatherers
LARGE = replace(LIMITS, max_batch_tokens=320)
SHORT = batch_of([(TOKENS, range(len(TOKENS)), range(4))])
LONG = batch_of([((TOKENS * 300)[:300], range(300), range(20))], outputs=[0, 150, 299])
VALUES = np.array([np.nan, np.inf, -np.inf], np.float32)
TYPES = (QuantType.F16, QuantType.Q8_0, QuantType.Q4_K)


@dataclass
class Spoiled:
    """A group that runs a batch while some members corrupt one number of their rows before a gather."""

    group: LinkedGroup
    program: Program
    accused: dict[int, list[int]] = field(default_factory=dict)

    def run(self, batch: Batch, at: int, members: Collection[int], value: np.float32) -> list[int]:
        self.accused.clear()
        gathers, bands = gathers_of(self.program), bands_of(self.program, batch.rows, BANDS)

        def spoils(member: int) -> PythonGatherer:
            def gather(number: int, own: Float32, whole: Float32) -> None:
                step = gathers[number // bands]
                if number == at and member in members:
                    own[:, -1] = value  # for int8 values, the last scale
                links[member].gather(number, own, whole, borders_in(step, whole.shape[1]), step.to)

            return PythonGatherer(gather)

        links = self.group.links
        for member, stage in enumerate(self.group.stages):
            assert isinstance(stage, GathersRows)
            spoiled = spoils(member)
            accused = self.accused[member] = []
            stage.gather_by(checked_gathers(spoiled, self.program, batch.rows, member, accused.append))
        self.group.run(batch, None)
        receivers = [member for member, accused in self.accused.items() if accused]
        first = {accused[0] for accused in self.accused.values() if accused}
        assert len(first) <= 1 and (not receivers or receivers[0] == 0), self.accused
        return [*first]


def gathers_of(program: Program) -> list[Gather]:
    return [step for step in program.steps if isinstance(step, Gather)]


def check_all(model: Model, batch: Batch, shares: tuple[int, ...] = SHARES) -> None:
    """Checks each member alone, and all members at once, for which none is accused; gathers of the leader's columns
    only involve the leader."""
    print(f"seed {SEED}")
    drawn, whole = Random(SEED), model.program(0, model.layer_count, KvType.F16, LARGE.max_context_tokens, 1)
    program = divide(whole, shares, 0)
    spoiled = Spoiled(LinkedGroup(model, whole, shares, 1, LARGE), program)
    last, members = (len(gathers_of(program)) - 1) * bands_of(program, batch.rows, BANDS), range(len(shares))
    for at in {0, last, *drawn.sample(range(last), 6)}:
        is_of_one = gathers_of(program)[at // bands_of(program, batch.rows, BANDS)].is_of_one
        for member in (0,) if is_of_one else members:
            value = drawn.choice(VALUES)
            assert spoiled.run(batch, at, [member], value) == [member], f"gather {at}, {value}"
        if not is_of_one:
            assert spoiled.run(batch, at, members, VALUES[0]) == [], f"gather {at}"
    assert spoiled.run(batch, -1, members, VALUES[0]) == []
    spoiled.group.close()


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("batch", [SHORT, LONG], ids=["one band", "two bands"])
def test_rows_as_floats_and_as_int8(batch: Batch, kind: QuantType, tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "model.gguf", quant_type=kind, hidden=512, ffn=1024, layers=2, kv_heads=4)
    with Model.open(path) as model:
        check_all(model, batch)


@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2", "gpt-oss"])
def test_experts_latent_attention_and_sinks(architecture: str, tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", architecture)) as model:
        check_all(model, SHORT, (1, 1))
