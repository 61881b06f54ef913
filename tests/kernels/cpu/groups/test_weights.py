"""Tests of groups with weights of every type, with adapters and with encoders: one stage's bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Backend, Batch
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.kernels.reference.dequantize import SUPPORTED_TYPES as REFERENCE_TYPES
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.across import Gather
from support.arithmetic.batches import LIMITS, batch_of
from support.arithmetic.members import CpuGroup
from support.arithmetic.reference_group import ReferenceGroup
from support.models.tiny_adapter import build_adapter, build_peft
from support.models.tiny_architectures import build_architecture
from support.models.tiny_encoders import ENCODERS, RANK, RERANKERS, build_encoder
from support.models.tiny_model import build_tiny_model

SHARES = (1, 1), (5, 3, 2)
TOKENS = (1, 5, 9, 300, 33, 65, 100, 3)


def batches() -> Iterator[Batch]:
    """Yields a prompt, then two sequences."""
    yield batch_of([(TOKENS, range(8), range(4))])
    yield batch_of([([11], [8], range(4)), ([4, 7], range(2), range(4, 8))])


def whole(model: Model) -> Program:
    return model.program(0, model.layer_count, KvType.F16, LIMITS.max_context_tokens)


def run(backend: Backend, model: Model, given: Sequence[Batch]) -> list[bytes]:
    program = whole(model)
    stage = backend.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    return [stage.run(batch, None).tobytes() for batch in given]


def assert_same_bits(model: Model, given: Sequence[Batch], *, reference: bool = True) -> None:
    """Checks groups of both backends with all shares."""
    program, expected = whole(model), run(CpuBackend(1), model, given)
    for shares in SHARES:
        group = CpuGroup(model, program, shares, 2)
        for batch, logits in zip(given, expected, strict=True):
            assert group.run(batch, None)[0].tobytes() == logits
    if not reference:
        return
    backend = ReferenceBackend()
    for shares in SHARES:
        parts = [divide(program, shares, member) for member in range(len(shares))]
        stages = [backend.load(part, model.tensors_for(part), LIMITS, lambda done_bytes: None) for part in parts]
        found = ReferenceGroup(stages)
        for batch, logits in zip(given, run(backend, model, given), strict=True):
            assert found.run(batch, None)[0].tobytes() == logits


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_every_type_of_weights(tmp_path: Path, kind: QuantType, experts: int) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", quant_type=kind, experts=experts, layers=2, heads=8, kv_heads=4)
    with Model.open(path) as model:
        program = divide(whole(model), SHARES[1], 0)
        names = [name for name in program.weights if "norm" not in name and "embd" not in name and "inp" not in name]
        assert all("[" in name for name in names), "a part of each matrix"
        assert_same_bits(model, [*batches()], reference=kind in REFERENCE_TYPES)


def with_scales(batch: Batch, adapters: int) -> Batch:
    """Gives every other row all adapters."""
    scales = np.zeros((batch.rows, adapters), np.float32)
    scales[::2] = np.linspace(0.5, -1.5, adapters, dtype=np.float32)
    return replace(batch, adapter_scales=scales)


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_adapters(tmp_path: Path, kind: str) -> None:
    shape = {"hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 96, "layers": 3}
    base = build_tiny_model(tmp_path / "m.gguf", quant_type=QuantType[kind], **shape)  # type: ignore[arg-type]
    first = build_adapter(tmp_path / "first.gguf", base)
    second = build_adapter(tmp_path / "second.gguf", base, rank=3, parts=("attn_q", "ffn_down"), seed=2)
    third = build_peft(tmp_path / "third", base, build_adapter(tmp_path / "other.gguf", base, seed=3))
    with Model.open(base, adapters=[first, second, third]) as model:
        assert len(model.tensors_for(divide(whole(model), (5, 3, 2), 1))) > 0
        assert_same_bits(model, [with_scales(batch, 3) for batch in batches()] + [*batches()])
        up = [name for name in divide(whole(model), (1, 1), 0).weights if name.partition("[")[0].endswith("lora_b")]
        assert up and all("[" in name for name in up), "rows of the second matrix"


def test_adapters_of_products_that_are_cut(tmp_path: Path) -> None:
    base = build_architecture(tmp_path / "model.gguf", "phi3-short")
    adapter = build_adapter(tmp_path / "a.gguf", base, parts=("attn_qkv", "ffn_up", "ffn_down", "attn_output"))
    with Model.open(base, adapters=[adapter]) as model:
        assert_same_bits(model, [with_scales(batch, 1) for batch in batches()])
        gathers = [step for step in divide(whole(model), (1, 1), 0).steps if isinstance(step, Gather)]
        assert len(gathers) <= 4 * model.layer_count + 2


@pytest.mark.parametrize(
    ("name", "pooling"), [*((name, 1) for name in ENCODERS), *((name, RANK) for name in RERANKERS)]
)
def test_encoders_and_rerankers(tmp_path: Path, name: str, pooling: int) -> None:
    tokens, rows = [2, *range(40, 60), 3], np.arange(22, dtype=np.int32)
    batch = batch_of([(tokens, range(22), range(2))], outputs=())
    with Model.open(build_encoder(tmp_path / "m.gguf", name, pooling)) as model:
        program = whole(model)
        one = CpuBackend(1).load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
        one.run(batch, None)
        expected = one.normed(rows).tobytes()
        for shares in SHARES:
            group = CpuGroup(model, program, shares, 2)
            group.run(batch, None)
            assert group.stages[0].normed(rows).tobytes() == expected
