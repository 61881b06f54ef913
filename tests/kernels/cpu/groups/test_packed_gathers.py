"""Tests of rows that members send as int8 values and scales: one stage's bits, with a quarter of the bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llamaclust.kernels._native import Plan
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.gathers import gather_formats
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from llamaclust.model.quant_types import ActivationFormat, QuantType
from support.arithmetic.batches import LIMITS, batch_of
from support.arithmetic.members import CpuGroup, LinkedGroup
from support.models.tiny_architectures import MODELS, TOKENS, build_architecture
from support.models.tiny_model import build_tiny_model

REFUSED = {"gemma3n", "gemma4-inputs"}  # models with layers that share KV
BATCHES = [
    batch_of([(TOKENS, range(len(TOKENS)), range(4))]),
    batch_of([([7], [len(TOKENS)], range(4))]),
    batch_of([([9], [len(TOKENS) + 1], range(4)), (TOKENS[:6], range(6), range(4, 8))]),
]
FORMATS = {ActivationFormat.Q8_32, ActivationFormat.Q8_256}


def whole(model: Model) -> Program:
    return model.program(0, model.layer_count, KvType.F16, LIMITS.max_context_tokens, 1)


def formats(model: Model, shares: tuple[float, ...]) -> Counter[ActivationFormat | None]:
    program = divide(whole(model), shares, 0)
    types = {name: tensor.quant_type for name, tensor in model.tensors_for(program).items()}
    return Counter(gather_formats(program, types))


def results(model: Model) -> list[Float32]:
    program = whole(model)
    stage = CpuBackend(1).load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    return [stage.run(batch, None).copy() for batch in BATCHES]


def assert_bits(group: CpuGroup, expected: list[Float32]) -> None:
    for batch, logits in zip(BATCHES, expected, strict=True):
        assert group.run(batch, None)[0].tobytes() == logits.tobytes()


@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_every_type_of_weights(tmp_path: Path, kind: QuantType) -> None:
    """Equal shares consist of whole segments; with unequal shares, some rows are sent as float32."""
    path = build_tiny_model(tmp_path / "model.gguf", quant_type=kind, hidden=512, ffn=1024, layers=2)
    packs = kind.info.activation in FORMATS
    with Model.open(path) as model:
        expected = results(model)
        assert formats(model, (1, 1)) == Counter(
            {kind.info.activation if packs else None: 4, None: 6 + 4 * (not packs)}
        )
        for threads, shares in ((1, (1.0, 1.0)), (2, (1.0, 1.0)), (2, (2.0, 1.0))):
            assert_bits(LinkedGroup(model, whole(model), shares, threads), expected)


@pytest.mark.parametrize("kind", [QuantType.Q4_0, QuantType.Q6_K, QuantType.MXFP4, QuantType.F16], ids=str)
def test_lines_of_experts(tmp_path: Path, kind: QuantType) -> None:
    """Members send their columns of each selected expert's gated activations."""
    path = build_tiny_model(tmp_path / "model.gguf", quant_type=kind, hidden=512, ffn=1024, layers=2, experts=4)
    packs = kind.info.activation in FORMATS
    with Model.open(path) as model:
        assert formats(model, (1, 1))[kind.info.activation] == 4 * packs
        for threads, shares in ((1, (1.0, 1.0)), (3, (1.0, 1.0)), (2, (2.0, 1.0, 1.0))):
            assert_bits(LinkedGroup(model, whole(model), shares, threads), results(model))


@pytest.mark.parametrize("kind", [QuantType.Q8_0, QuantType.IQ4_NL])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - REFUSED))
def test_every_family(tmp_path: Path, name: str, kind: QuantType) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name, kind)) as model:
        expected = results(model)
        for shares in ((1.0, 1.0), (1.0, 2.0, 1.0)):
            assert_bits(CpuGroup(model, whole(model), shares, 1), expected)


@pytest.mark.parametrize(
    ("kind", "row_bytes"),
    [(QuantType.Q4_0, (256 + 32, 512 + 64)), (QuantType.Q4_K, (256 + 4, 512 + 8)), (QuantType.F16, (1024, 2048))],
)
def test_bytes_of_a_row(tmp_path: Path, kind: QuantType, row_bytes: tuple[int, int]) -> None:
    """Members send halves of attention, of the product after it, of the activations and of the last product. Embedding
    rows are sent one way, logits the other way; a member without columns sends only a header."""
    path = build_tiny_model(tmp_path / "model.gguf", quant_type=kind, hidden=512, ffn=1024, layers=3)
    with Model.open(path) as model:
        group = LinkedGroup(model, whole(model), (1.0, 1.0), 1)
        group.run(BATCHES[1], None)
    first, second = (links.counters() for links in group.links)
    header, layer = 24, row_bytes[0] + 1024 + row_bytes[1] + 1024
    assert first.sent_bytes == second.received_bytes == 3 * (4 * header + layer) + header + 512 * 4
    assert second.sent_bytes == first.received_bytes == 3 * (4 * header + layer) + 2 * header + 320 // 2 * 4


def test_a_row_that_others_read_too_goes_as_it_is(tmp_path: Path) -> None:
    """Covers products with different activation formats, and a float32 product beside one that quantizes."""
    for other, packed in ((QuantType.Q4_K, 0), (QuantType.F16, 0), (QuantType.Q8_0, 2)):
        others = {"attn_output": other, "ffn_down": other}
        path = build_tiny_model(
            tmp_path / f"{other.name}.gguf",
            quant_type=QuantType.Q4_0,
            hidden=512,
            ffn=1024,
            layers=1,
            other_types=others,
        )
        with Model.open(path) as model:
            found = formats(model, (1, 1))
            assert found[ActivationFormat.Q8_32] == packed
            assert found[ActivationFormat.Q8_256] == (2 if other is QuantType.Q4_K else 0)
            assert_bits(LinkedGroup(model, whole(model), (1.0, 1.0), 1), results(model))


@pytest.mark.parametrize(
    ("x", "out", "form", "words"),
    [
        (64, 17, 1, "whole segments"),
        (48, 13, 1, "whole segments"),
        (256, 64, 2, "whole segments"),
        (64, 18, 9, "format"),
    ],
)
def test_packed_rows_of_another_width_are_refused(x: int, out: int, form: int, words: str) -> None:
    plan = Plan(4, 4, 1, 16, 1)
    own, packed = (plan.add_buffer(width, 1, False, 4) for width in (x, out))
    with pytest.raises(ValueError, match=words):
        plan.pack(own, packed, form)
    with pytest.raises(ValueError, match=words):
        plan.unpack(packed, 0, form)


def test_rows_for_a_member_that_there_is_not() -> None:
    for to in (2, -2):
        plan = Plan(4, 4, 1, 16, 1)
        x, out = (plan.add_buffer(width, 1, False, 4) for width in (32, 64))
        with pytest.raises(ValueError, match="rows for a member that there is not"):
            plan.gather(x, out, [0, 32, 64], to)
