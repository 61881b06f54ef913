"""Tests of every step kind over many shapes: all backends against the reference, feature levels against each other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.program import (
    Add,
    AddPosition,
    AddRow,
    Buffer,
    Embed,
    LayerNorm,
    MatMul,
    RmsNorm,
    Rope,
    RopeTable,
    SelectRows,
    SiluMul,
)
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.model.steps.options import RopeStyle
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, Float32, attention_case, generator_of, moe_case, whole_numbers
from support.arithmetic.single_steps import (
    Case,
    Weight,
    check_conformance,
    error,
    normal,
    program_of,
    rows_at,
    splitter,
)
from support.models.tiny_quantizers import quantize

FLOAT_TYPES = [QuantType.F32, QuantType.F16, QuantType.BF16]
SMALL_TYPES = [
    QuantType.Q8_0,
    QuantType.Q4_0,
    QuantType.Q4_1,
    QuantType.Q5_0,
    QuantType.Q5_1,
    QuantType.IQ4_NL,
    QuantType.MXFP4,
]
WIDE_TYPES = [
    QuantType.Q2_K,
    QuantType.Q3_K,
    QuantType.Q4_K,
    QuantType.Q5_K,
    QuantType.Q6_K,
    QuantType.IQ4_XS,
    QuantType.TQ2_0,
    QuantType.TQ1_0,
]
GRID_TYPES = [kind for kind in QuantType if kind.name.startswith(("IQ1", "IQ2", "IQ3"))]
TYPES = [*FLOAT_TYPES, *SMALL_TYPES, *WIDE_TYPES, *GRID_TYPES]

# Allows for float32 sums in another order and 8-bit activations, which cost 2e-5 (a scale per 32) to 5e-5 (per 256).
ROUNDED = 1.5e-4

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 17, 64]


def matmul_case(quant_type: QuantType, cols: int, rows: int, hidden: list[Float32], biased: bool) -> Case:
    generator = generator_of(quant_type, cols, rows)
    x, out = Buffer("x", cols), Buffer("out", rows)
    weights = {"w": Weight(normal(generator, rows, cols), quant_type)}
    if biased:
        weights["b"] = Weight(normal(generator, rows))
    step = MatMul(x, out, "w", "b" if biased else None)
    return Case(program_of(x, out, step), weights, [(rows_at(range(len(part))), part) for part in hidden])


@pytest.mark.parametrize(("cols", "rows"), [(256, 1), (256, 16), (256, 161), (1536, 15), (1536, 40)])
@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_matmul(tmp_path: Path, quant_type: QuantType, cols: int, rows: int) -> None:
    """Activations need no rounding, so results differ only by the order of float additions."""
    generator = generator_of("x", quant_type, cols, rows)
    hidden = [whole_numbers(generator, tokens, cols) for tokens in ROWS]
    check_conformance(tmp_path, matmul_case(quant_type, cols, rows, hidden, biased=rows % 2 == 0), EXACT)


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q8_0, QuantType.Q4_K], ids=lambda kind: kind.name)
def test_matmul_of_many_rows_with_a_small_matrix(tmp_path: Path, quant_type: QuantType) -> None:
    """Threads divide the rows of the product."""
    generator = generator_of("many", quant_type)
    hidden = [whole_numbers(generator, tokens, 256) for tokens in (150, 330)]
    check_conformance(tmp_path, matmul_case(quant_type, 256, 161, hidden, biased=True), EXACT)


@pytest.mark.parametrize("cols", [32, 96, 288, 576])
@pytest.mark.parametrize("quant_type", [*FLOAT_TYPES, *SMALL_TYPES], ids=lambda kind: kind.name)
def test_matmul_of_narrow_blocks(tmp_path: Path, quant_type: QuantType, cols: int) -> None:
    generator = generator_of("x", quant_type, cols)
    hidden = [whole_numbers(generator, tokens, cols) for tokens in (1, 2, 9)]
    check_conformance(tmp_path, matmul_case(quant_type, cols, 33, hidden, biased=False), EXACT)


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_matmul_of_rounded_activations(tmp_path: Path, quant_type: QuantType) -> None:
    generator = generator_of("x", quant_type)
    scales = np.exp(2 * normal(generator, 17, 1))
    hidden = [normal(generator, tokens, 512) * scales[:tokens] for tokens in (1, 5, 17)]
    bound = EXACT if quant_type.info.activation is ActivationFormat.F32 else ROUNDED
    check_conformance(tmp_path, matmul_case(quant_type, 512, 48, hidden, biased=True), bound)


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_a_wrong_weight_is_noticed(quant_type: QuantType) -> None:
    """The bound of exact products is tight: one weight of 48 x 512 that is off by one step exceeds it."""
    generator = generator_of(quant_type)
    data = bytearray(quantize(normal(generator, 48, 512), quant_type))
    x = whole_numbers(generator, 17, 512)
    products = []
    for _ in range(2):
        products.append(x @ dequantize(quant_type, data, 48 * 512).reshape(48, 512).T)
        data[quant_type.info.block_bytes // 2 + quant_type.info.block_bytes * 7] ^= 1
    assert error(products[1], products[0]) > 10 * EXACT or quant_type is QuantType.F32


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_rows_of_zeros(tmp_path: Path, quant_type: QuantType) -> None:
    generator = generator_of(quant_type)
    x = whole_numbers(generator, 3, 256)
    x[1] = 0
    check_conformance(tmp_path, matmul_case(quant_type, 256, 24, [x], biased=True), EXACT)


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_embed(tmp_path: Path, quant_type: QuantType) -> None:
    generator, out = generator_of(quant_type), Buffer("out", 512)
    tokens = generator.integers(0, 75, 40)
    case = Case(
        program_of(out, out, Embed(out, "w"), first=True),
        {"w": Weight(normal(generator, 75, 512), quant_type)},
        [(batch_of([(tokens, range(40), [0, 1, 2])]), None), (batch_of([([74], [0], [0])]), None)],
    )
    check_conformance(tmp_path, case, 1e-14)


@pytest.mark.parametrize("width", [16, 32, 64, 96, 576, 2048])
def test_rms_norm(tmp_path: Path, width: int) -> None:
    generator, x, out = generator_of(width), Buffer("x", width), Buffer("out", width)
    hidden = [normal(generator, rows, width) * np.float32(10.0**power) for rows, power in ((1, 0), (7, -4), (33, 4))]
    case = Case(
        program_of(x, out, RmsNorm(x, out, "w", 1e-5)),
        {"w": Weight(normal(generator, width))},
        [(rows_at(range(len(part))), part) for part in hidden],
    )
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize("width", [16, 32, 96, 577, 2048])
def test_layer_norm(tmp_path: Path, width: int) -> None:
    generator, x, out = generator_of(width), Buffer("x", width), Buffer("out", width)
    hidden = [
        normal(generator, rows, width) * np.float32(10.0**power) + 3 for rows, power in ((1, 0), (7, -1), (33, 4))
    ]
    case = Case(
        program_of(x, out, LayerNorm(x, out, "w", "b", 1e-5)),
        {"w": Weight(normal(generator, width)), "b": Weight(normal(generator, width))},
        [(rows_at(range(len(part))), part) for part in hidden],
    )
    check_conformance(tmp_path, case, 1e-10)


@pytest.mark.parametrize("quant_type", [QuantType.F32, QuantType.F16, QuantType.Q8_0], ids=lambda kind: kind.name)
def test_add_position(tmp_path: Path, quant_type: QuantType) -> None:
    generator, x, out = generator_of(quant_type), Buffer("x", 96), Buffer("out", 96)
    case = Case(
        program_of(x, out, AddPosition(x, out, "w")),
        {"w": Weight(normal(generator, 4096, 96), quant_type)},
        [(rows_at(places), normal(generator, len(places), 96)) for places in (range(0, 1), range(4063, 4096))],
    )
    check_conformance(tmp_path, case, 1e-14)


@pytest.mark.parametrize("quant_type", [QuantType.F32, QuantType.F16, QuantType.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("row", [0, 2])
def test_add_row(tmp_path: Path, quant_type: QuantType, row: int) -> None:
    generator, x, out = generator_of(quant_type), Buffer("x", 96), Buffer("out", 96)
    case = Case(
        program_of(x, out, AddRow(x, out, "w", row)),
        {"w": Weight(normal(generator, 3, 96), quant_type)},
        [(rows_at(range(rows)), normal(generator, rows, 96)) for rows in (1, 33)],
    )
    check_conformance(tmp_path, case, 1e-14)


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize(("heads", "head_dim", "rotary"), [(1, 16, 16), (9, 64, 64), (3, 80, 32), (4, 128, 128)])
def test_rope(tmp_path: Path, heads: int, head_dim: int, rotary: int, style: RopeStyle) -> None:
    generator, x = generator_of(heads, head_dim), Buffer("x", heads * head_dim)
    table = RopeTable(tuple(10000.0 ** (-2 * i / rotary) for i in range(rotary // 2)), scale=1.25)
    places = [range(0, 1), range(5, 25), range(4000, 4096)]
    case = Case(
        program_of(x, x, Rope(x, heads, head_dim, style, table)),
        {},
        [(rows_at(positions), normal(generator, len(positions), x.width)) for positions in places],
    )
    check_conformance(tmp_path, case, EXACT)


HEADS = [(1, 1, 16), (4, 4, 32), (8, 2, 32), (9, 3, 64), (4, 1, 80), (4, 2, 128)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention(tmp_path: Path, heads: int, kv_heads: int, head_dim: int) -> None:
    chunks = [range(0, 1), range(1, 2), range(2, 15), range(15, 48), range(48, 49), range(49, 130)]
    check_conformance(tmp_path, attention_case(heads, kv_heads, head_dim, chunks), EXACT)


def test_attention_over_several_spans(tmp_path: Path) -> None:
    """The first token after 512 and 1024 positions begins a span; one chunk crosses a span border."""
    bounds = [0, 150, 300, 450, 511, 512, 513, 600, 700, 850, 1000, 1024, 1025, 1100]
    chunks = [range(start, end) for start, end in itertools.pairwise(bounds)]
    check_conformance(tmp_path, attention_case(4, 2, 32, chunks), EXACT)


def test_attention_of_sequences_beside_each_other(tmp_path: Path) -> None:
    generator, case = generator_of("several"), attention_case(8, 2, 32, [])
    tables = [[7, 3, 250], [0], [299, 1, 2, 5]]
    prefill = batch_of(
        [([0] * 33, range(33), tables[0]), ([0] * 5, range(5), tables[1]), ([0] * 50, range(50), tables[2])]
    )
    decode = batch_of([([0], [33], tables[0]), ([0], [5], tables[1]), ([0], [50], tables[2])])
    runs = [(batch, 2 * normal(generator, batch.rows, case.program.hidden.width)) for batch in (prefill, decode)]
    check_conformance(tmp_path, Case(case.program, case.weights, runs), EXACT)


def test_attention_with_one_score_far_above(tmp_path: Path) -> None:
    """Exponentials of differences down to -1000 are 0, not NaN."""
    case = attention_case(2, 1, 16, [range(0, 40), range(40, 41)])
    runs = [(batch, hidden * np.float32(40)) for batch, hidden in case.runs if hidden is not None]
    check_conformance(tmp_path, Case(case.program, case.weights, runs), EXACT)


@pytest.mark.parametrize("width", [16, 96, 512])
@pytest.mark.parametrize("in_place", [True, False])
def test_silu_mul_and_add(tmp_path: Path, width: int, in_place: bool) -> None:
    generator = generator_of(width)
    gate, up, product, total = (Buffer(name, width) for name in ("gate", "up", "product", "total"))
    x = Buffer("x", 2 * width)
    copies, weights = splitter(x, [gate, up])
    activated = gate if in_place else product
    out = up if in_place else total
    steps = [*copies, SiluMul(gate, up, activated), Add(up, activated, out)]
    hidden = [8 * normal(generator, rows, x.width) for rows in (1, 3, 40)]
    runs = [(rows_at(range(len(part))), part) for part in hidden]
    check_conformance(tmp_path, Case(program_of(x, out, *steps), weights, runs), EXACT)


def test_silu_far_from_zero(tmp_path: Path) -> None:
    gate, up, out = (Buffer(name, 64) for name in ("gate", "up", "out"))
    x = Buffer("x", 128)
    copies, weights = splitter(x, [gate, up])
    values = np.concatenate([np.linspace(-120, 120, 64), np.linspace(0.5, 1.5, 64)]).astype(np.float32)
    case = Case(program_of(x, out, *copies, SiluMul(gate, up, out)), weights, [(rows_at(range(1)), values[None])])
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize(("experts", "used"), [(2, 1), (3, 3), (8, 2), (40, 6)])
@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q8_0, QuantType.Q4_K], ids=lambda kind: kind.name)
def test_moe(tmp_path: Path, quant_type: QuantType, experts: int, used: int) -> None:
    bound = EXACT if quant_type is QuantType.F16 else ROUNDED
    check_conformance(tmp_path, moe_case(quant_type, experts, used, ffn=256), bound)


def test_moe_ties_go_to_the_lower_id(tmp_path: Path) -> None:
    case = moe_case(QuantType.F16, experts=8, used=3, ffn=64)
    router = case.weights["router"].values.copy()
    router[[2, 5, 6]] = router[4]
    check_conformance(tmp_path, Case(case.program, {**case.weights, "router": Weight(router)}, case.runs), EXACT)


def test_select_rows(tmp_path: Path) -> None:
    generator, x, few, out = generator_of("select"), Buffer("x", 64), Buffer("few", 64), Buffer("out", 40)
    sequences = [([0] * 9, range(9), [0]), ([0] * 30, range(30), [1, 2])]
    runs = [(batch_of(sequences, outputs=rows), normal(generator, 39, 64)) for rows in ([8, 38], [0], range(39))]
    program = program_of(x, out, SelectRows(x, few), MatMul(few, out, "w"), last=True)
    case = Case(program, {"w": Weight(normal(generator, 40, 64))}, runs)
    check_conformance(tmp_path, case, EXACT)
