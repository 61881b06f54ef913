"""Checks that fused kernels give the bits of the CPU backend's separate steps, and counts launches of a layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels import _native
from llamaclust.kernels.cuda.executor.fuse import Attended, Gated, Norm, fuse_for_gpu
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches import elementwise, matmul
from llamaclust.kernels.cuda.launches.attention import can_quantize
from llamaclust.kernels.cuda.launches.elementwise import WIDEST_ROW
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import Buffer as DeviceBuffer
from llamaclust.kernels.fuse import Attend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import (
    Activate,
    Add,
    Attention,
    Buffer,
    Embed,
    MatMul,
    Moe,
    Mul,
    Program,
    RmsNorm,
    Rope,
    RopeTable,
    SelectRows,
    SiluMul,
    Slice,
    Step,
)
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.model.steps.options import SWIGLU_LIMIT, ActivationFunction, ExpertOptions, GatedActivation, RopeStyle
from support.arithmetic.batches import batch_of
from support.arithmetic.matmul_cases import check_equal_bits, random_activations, random_weights
from support.arithmetic.single_steps import Weight, program_of, rows_at
from support.cuda.attending import Attender, attention, sequences_of
from support.cuda.exact import Float32, awkward, on_cpu, random_source, same_bits
from support.cuda.launching import Bench
from support.cuda.product_cases import LEVEL, count_of, generator_of, limits_of, load, none_numbers, segment_cols
from support.cuda.product_cases import quantized as activations_of
from support.cuda.row_cases import BUCKET, ROWS, one_part, rows_of, two_parts
from support.models.tiny.shape import Tiny
from support.models.tiny_architectures import build_tiny
from support.models.tiny_model import build_tiny_model

NONE = np.uint64(0)
EIGHT_BITS = (ActivationFormat.Q8_32, ActivationFormat.Q8_256)


def cleared(bench: Bench, kind: ActivationFormat, width: int, lines: int = BUCKET) -> DeviceBuffer:
    """Allocates zeros for quantized rows; padding rows stay zero."""
    return bench.put(np.zeros(matmul.activation_bytes(kind, lines, width), np.uint8))


def quantized(bench: Bench, kind: ActivationFormat, x: Float32, multiple: int = 1) -> NDArray[np.uint8]:
    """Quantizes rows with the kernel that tests of products use."""
    lines, width = BUCKET * multiple, x.shape[1]
    out = cleared(bench, kind, width, lines)
    count = rows_of(bench).at()
    bench.device.launch(matmul.quantize(kind, bench.put(x).at(), width, RowCount(lines, count, multiple), out.at()))
    return bench.get(out, out.n_bytes, np.uint8)


@pytest.mark.parametrize("width", [1, 7, 100, 1023, 256, 1056, 4096, WIDEST_ROW // 256 * 256, WIDEST_ROW])
@pytest.mark.parametrize("adds", [True, False], ids=["sum", "no sum"])
def test_sum_norm_and_quantization(bench: Bench, width: int, adds: bool) -> None:
    source = random_source()
    parts, weight = awkward(source, ROWS, 2 * width), source.standard_normal(width, np.float32)
    x, y = parts[:, :width].copy(), parts[:, width:].copy()
    wanted_sum = two_parts(width, lambda a, b: Add(a, b, b), parts) if adds else x
    wanted = one_part(width, lambda a, out: RmsNorm(a, out, "w", 1e-5), wanted_sum, w=weight)
    step = RmsNorm(Buffer("x", width), Buffer("out", width), "w", 1e-5)
    kinds = [kind for kind in EIGHT_BITS if width % kind == 0]
    there, out = bench.put(x), bench.room(x.nbytes)
    eights = {kind: cleared(bench, kind, width) for kind in kinds}
    at = [eights[kind].at() if kind in eights else NONE for kind in EIGHT_BITS]
    for floats in (out.at(), NONE):  # the second time without floats
        bench.device.upload(there, 0, x.reshape(-1).view(np.uint8))
        second, total = (bench.put(y).at(), there.at()) if adds else (NONE, NONE)
        outs = (floats, at[0], at[1])
        rows, inputs = RowCount(BUCKET, rows_of(bench).at()), (there.at(), second)
        launch = elementwise.add_rms_norm(step, inputs, bench.put(weight).at(), total, outs, rows)
        bench.device.launch(launch)
        same_bits(bench.get(there, x.shape), wanted_sum)
        same_bits(bench.get(out, x.shape), wanted)
        for kind, eight in eights.items():
            np.testing.assert_array_equal(bench.get(eight, eight.n_bytes, np.uint8), quantized(bench, kind, wanted))


@pytest.mark.parametrize("kind", EIGHT_BITS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("segments", "multiple"), [(1, 1), (3, 1), (11, 1), (3, 4)])
@pytest.mark.parametrize("function", ActivationFunction)
def test_gate_and_quantization(
    bench: Bench, kind: ActivationFormat, segments: int, multiple: int, function: ActivationFunction
) -> None:
    width, lines = segments * kind, ROWS * multiple
    both = awkward(random_source(), lines, 2 * width)
    hidden, gate, up = Buffer("x", 2 * width), Buffer("gate", width), Buffer("up", width)
    steps: list[Step] = [Slice(hidden, gate, 0), Slice(hidden, up, width)]
    steps += [Activate(gate, gate, function), Mul(gate, up, gate)]
    wanted = on_cpu(program_of(hidden, gate, *steps), {}, rows_at(range(lines)), both)
    check_gated(bench, kind, f"{function}_mul", both, wanted)


@pytest.mark.parametrize("kind", EIGHT_BITS, ids=lambda kind: kind.name)
def test_clamped_gates(bench: Bench, kind: ActivationFormat) -> None:
    """The expected values are those of an expert whose matrices only copy channels."""
    width, lines = 3 * kind, ROWS * 2
    both = 8 * random_source().standard_normal((lines, 2 * width), np.float32)
    halves, x, out = np.split(np.eye(2 * width, dtype=np.float32), 2), Buffer("x", 2 * width), Buffer("out", width)
    values = {
        "router": np.zeros((1, 2 * width), np.float32),
        "gate": halves[0][None],
        "up": halves[1][None],
        "down": np.eye(width, dtype=np.float32)[None],
    }
    options = ExpertOptions(activation=GatedActivation.CLAMPED_SWIGLU)
    step = Moe(x, out, "router", "gate", "up", "down", 1, 1, width, options)
    weights = {name: Weight(matrix) for name, matrix in values.items()}
    wanted = on_cpu(program_of(x, out, step), weights, rows_at(range(lines)), both)
    assert (both > SWIGLU_LIMIT).any() and (both < -SWIGLU_LIMIT).any()
    check_gated(bench, kind, "clamped_swiglu", both, wanted)


def check_gated(bench: Bench, kind: ActivationFormat, kernel: str, both: Float32, wanted: Float32) -> None:
    """Checks gate and up in separate matrices and side by side in one, as quantized values and as floats."""
    width, multiple = wanted.shape[1], len(wanted) // ROWS
    left, right, joined = (bench.put(np.ascontiguousarray(x)) for x in (both[:, :width], both[:, width:], both))
    rows = RowCount(BUCKET * multiple, rows_of(bench).at(), multiple)
    for inputs in (
        elementwise.GatedInputs(kernel, left.at(), right.at(), width),
        elementwise.GatedInputs(kernel, joined.at(), joined.at() + np.uint64(4 * width), 2 * width),
    ):
        out, floats = cleared(bench, kind, width, BUCKET * multiple), bench.room(wanted.nbytes)
        bench.device.launch(matmul.quantize_gated(kind, inputs, width, rows, out.at()))
        np.testing.assert_array_equal(bench.get(out, out.n_bytes, np.uint8), quantized(bench, kind, wanted, multiple))
        bench.device.launch(elementwise.gated_lines(inputs, width, rows, floats.at()))
        same_bits(bench.get(floats, wanted.shape), wanted)


@pytest.mark.parametrize("kind", [QuantType.Q4_K, QuantType.Q5_1, QuantType.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows_there", [1, 11, 70])
@pytest.mark.parametrize("shape", [(33, 16), (1, 70, 17), (275, 40, 83)], ids=["two", "three", "many tiles a block"])
def test_products_in_one_launch(bench: Bench, kind: QuantType, rows_there: int, shape: tuple[int, ...]) -> None:
    """`shape` lists the rows of each matrix; some tiles and blocks are not full, and some matrices have a bias."""
    cols, bucket = 2 * segment_cols(kind), rows_there + 3
    generator = generator_of(kind, rows_there, shape)
    x = random_activations(generator, rows_there, cols)
    none_numbers(x, segment_cols(kind))
    them, wanted = [], []
    for number, n in enumerate(shape):
        loaded = load(bench, kind, random_weights(generator, kind, n, cols), n, cols)
        bias = random_activations(generator, 1, n)[0] if number != 1 else None
        out = bench.put(np.full((bucket, n), np.float32(7)))
        at = NONE if bias is None else bench.put(bias).at()
        them.append((matmul.Product(loaded.weights, at, out.at()), out))
        wanted.append(_native.matmul(LEVEL, loaded.on_cpu, x, 1, bias))
    activations = activations_of(bench, them[0][0].weights, x, bucket)
    rows = RowCount(bucket, count_of(bench, rows_there))
    bench.device.launch(matmul.multiply([product for product, _ in them], activations, rows, limits_of(bench, 1)))
    for (one, out), expected in zip(them, wanted, strict=True):
        found = bench.get(out, (bucket, one.weights.rows))
        check_equal_bits(found[:rows_there], expected, kind, one.weights.rows)
        assert (found[rows_there:] == 7).all()


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize(
    ("step", "pairs"),
    [
        (attention(4, 1, 64), 32),
        (attention(2, 2, 128, KvType.Q8_0), 64),
        (attention(6, 2, 100), 33),
        (attention(3, 1, 34, KvType.Q8_0), 17),
    ],
)
def test_rotation_and_store(bench: Bench, tmp_path: Path, step: Attention, pairs: int, style: RopeStyle) -> None:
    """Covers prompts, and single rows of two sequences at different positions."""
    table = RopeTable(tuple(10000.0 ** (-np.arange(pairs) / pairs)), 1.25)
    q, k = (Rope(part, n, step.head_dim, style, table) for part, n in ((step.q, step.heads), (step.k, step.kv_heads)))
    long, short = sequences_of(tmp_path, step, (40, 11), random_source(), (q, k))
    attender = Attender(bench, step, before=(q, k))
    attender.check([(long, range(39)), (short, range(10))])
    attender.check([(short, range(10, 11)), (long, range(39, 40))], one_row_each=True)


HEAD_NORMS = {
    "as qwen3": (attention(4, 1, 128), 64, "qk"),
    "bytes": (attention(4, 2, 64, KvType.Q8_0), 32, "qk"),
    "integers, odd": (attention(3, 1, 33, KvType.INT8), 16, "qk"),
    "odd": (attention(6, 2, 37), 18, "qk"),
    "a part rotates": (attention(2, 1, 100, KvType.Q8_0), 16, "qk"),
    "no rotation": (attention(8, 1, 80), 0, "qk"),
    "of queries": (attention(4, 2, 64), 32, "q"),
    "of keys": (attention(4, 2, 64), 32, "k"),
    "many heads": (attention(20, 1, 40), 20, "qk"),
}


@pytest.mark.parametrize(("step", "pairs", "normed"), HEAD_NORMS.values(), ids=HEAD_NORMS)
@pytest.mark.parametrize("style", RopeStyle)
def test_norms_of_heads(
    bench: Bench, tmp_path: Path, step: Attention, pairs: int, normed: str, style: RopeStyle
) -> None:
    """One launch computes norms and rotation, for prompts and for one to eight single rows of sequences."""
    table = RopeTable(tuple(10000.0 ** (-np.arange(pairs) / max(pairs, 1))), 1.25)
    parts = [("q", step.q, step.heads), ("k", step.k, step.kv_heads)]
    norms = [RmsNorm(x, x, f"{name}_norm", 1e-3, n) for name, x, n in parts if name in normed]
    ropes = [Rope(x, n, step.head_dim, style, table) for _, x, n in parts if pairs]
    told = sequences_of(tmp_path, step, range(9, 17), random_source(), (*norms, *ropes))
    attender = Attender(bench, step, before=(*norms, *ropes))
    attender.check([(one, range(len(one.rows) - 2)) for one in told])
    for back, ones, decode in ((2, told, True), (1, told[:1], True), (1, told[1:4], False)):
        rows = [(one, range(len(one.rows) - back, len(one.rows) - back + 1)) for one in ones]
        attender.check(rows, one_row_each=decode)
    stored = any("store" in kernel for kernel in attender.launched)
    assert stored and any("few" in kernel for kernel in attender.launched) == (step.heads // step.kv_heads <= 16)


@pytest.mark.parametrize("kind", EIGHT_BITS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "step",
    [
        *(attention(8, 1, 32), attention(4, 1, 64, sinks="sinks"), attention(4, 2, 128), attention(2, 1, 256)),
        *(attention(8, 2, 32, sinks="sinks"), attention(6, 2, 256, KvType.Q8_0, sinks="sinks")),
        *(attention(4, 4, 128, KvType.Q8_0), attention(4, 4, 64), attention(8, 8, 32, sinks="sinks")),
        *(attention(12, 4, 64, KvType.INT8), attention(20, 4, 64)),
    ],
)
@pytest.mark.parametrize("decode", [False, True])
def test_spans_together_and_quantization(
    bench: Bench, tmp_path: Path, kind: ActivationFormat, step: Attention, decode: bool
) -> None:
    """Covers a row of several spans, and a row of one span, which only this kernel quantizes."""
    long, short = sequences_of(tmp_path, step, (515, 4), random_source())
    attender, width = Attender(bench, step), step.out.width
    assert can_quantize(step, attender.room)
    short_room = replace(attender.room, max_context_tokens=512)
    assert not can_quantize(step, short_room)
    is_merged = step.heads < 20  # of heads with whole pieces of 256 channels
    assert can_quantize(step, short_room, decode=True) == is_merged
    for told in (long, short):
        attender.fill(told, len(told.rows) - 1)
    parts = [(long, range(514, 515)), (short, range(3, 4))]
    out = cleared(bench, kind, width)
    attender.quantized = {f"by_{kind.value}": out.at()}
    batch = batch_of([([0], rows, told.table) for told, rows in parts])
    attender.launched.clear()
    attender.run(batch, np.concatenate([told.rows[-1:] for told, _ in parts]), one_row_each=decode)
    assert any("merge" in kernel for kernel in attender.launched) == (not decode or not is_merged)
    wanted = np.concatenate([*(told.wanted[-1:] for told, _ in parts), np.zeros((ROWS - 2, width), np.float32)])
    found, wanted_bytes = bench.get(out, out.n_bytes, np.uint8), quantized(bench, kind, wanted)
    np.testing.assert_array_equal(found, wanted_bytes)


def fused(out: Buffer, *steps: Step, types: dict[str, QuantType] | None = None, last: bool = False) -> list[object]:
    program = Program(2 if last else 1, 3 if last else 2, 3, Buffer("x", 512), out, steps)
    return list(fuse_for_gpu(program, lambda name: (types or {}).get(name, QuantType.Q4_K)))


X, Y, N, G, U = (Buffer(name, 512) for name in "xyngu")
ADD, NORM = Add(X, Y, X), RmsNorm(X, N, "norm", 1e-5)


def test_what_is_fused() -> None:
    only, both = frozenset([ActivationFormat.Q8_256]), frozenset([ActivationFormat.F32, ActivationFormat.Q8_256])
    gate, up = MatMul(N, G, "gate"), MatMul(N, U, "up")
    gated, down = SiluMul(G, U, G), MatMul(G, Y, "down")
    found = fused(Y, ADD, NORM, gate, up, gated, down)
    assert found[0] == Norm(NORM, ADD, only)
    assert found[2] == Gated(G, U, G, ActivationFunction.SILU, ActivationFormat.Q8_256)
    assert len(found) == 4
    assert fused(N, ADD, NORM, gate)[0] == Norm(NORM, ADD, both), "the stage's result"
    assert fused(Y, NORM, gate, Add(N, G, Y))[0] == Norm(NORM, None, both), "read later"
    assert fused(Y, NORM, gate, types={"gate": QuantType.F16})[0] == Norm(NORM, None, both - only)
    gelu, mul = Activate(G, G, ActivationFunction.GELU_TANH), Mul(G, U, G)
    attend = attention(8, 8, 64)
    output = MatMul(attend.out, Y, "output")
    assert fused(Y, attend, output)[0] == Attended(Attend(attend), format=ActivationFormat.Q8_256)
    assert fused(Y, attend, output, types={"output": QuantType.F16})[0] == Attended(Attend(attend))
    assert fused(attend.out, attend, output)[0] == Attended(Attend(attend)), "the stage's result"
    q, k = (RmsNorm(x, x, "norm", 1e-5, 8) for x in (attend.q, attend.k))
    ropes = [Rope(norm.x, 8, 64, RopeStyle.NEOX, RopeTable((1.0, 0.5), 1.0)) for norm in (q, k)]
    for norms in ((q, k), (k, q), (q,), (k,)):
        fused_ropes = Attend(attend, *ropes)
        assert fused(Y, *norms, *ropes, attend, output) == [
            Attended(fused_ropes, norms, ActivationFormat.Q8_256),
            *fused(Y, output),
        ]
        assert fused(Y, *norms, attend)[0] == Attended(Attend(attend), norms), "without a rotation"
    assert fused(Y, gelu, mul, down)[0] == Gated(G, U, G, ActivationFunction.GELU_TANH, ActivationFormat.Q8_256)


def test_what_is_not() -> None:
    """These steps are not fused."""
    gate, down, wide = MatMul(N, G, "gate"), MatMul(G, Y, "down"), Buffer("x", WIDEST_ROW + 1)
    select = SelectRows(X, X)
    for steps in (
        (ADD, select),
        (RmsNorm(Y, Y, "post", 1e-5), ADD),
        (RmsNorm(X, N, "norm", 1e-5, heads=2), gate),
        (RmsNorm(wide, Buffer("n", wide.width), "norm", 1e-5), MatMul(Buffer("n", wide.width), G, "gate")),
        (Activate(G, G, ActivationFunction.GELU_ERF), down),
        (Activate(G, N, ActivationFunction.GELU_ERF), Mul(N, G, G), down),
    ):
        found = fused(Y, Embed(X, "tokens"), *steps)
        assert not any(isinstance(one, Norm | Gated) for one in found), steps
    for types in ({"down": QuantType.F16}, {"more": QuantType.F32}):
        found = fused(Y, SiluMul(G, U, G), down, MatMul(G, Y, "more"), types=types)
        assert found[0] == SiluMul(G, U, G), "floats are wanted"
    assert fused(G, SiluMul(G, U, G), down)[0] == SiluMul(G, U, G), "the stage's result"


def test_which_norms_of_heads_are_not() -> None:
    """These norms stay separate steps; the norm of keys is still fused."""
    attend, other = attention(8, 8, 64), Buffer("other", 512)
    q, k = (RmsNorm(x, x, "norm", 1e-5, 8) for x in (attend.q, attend.k))
    turn, turn_back = (RopeTable((1.0, factor), 1.0) for factor in (0.5, 0.25))
    rope_q, rope_k = (Rope(x, 8, 64, RopeStyle.NEOX, turn) for x in (attend.q, attend.k))
    for norm in (
        RmsNorm(other, attend.q, "norm", 1e-5, 8),  # from another buffer
        RmsNorm(Buffer("v", 512), Buffer("v", 512), None, 1e-5, 8),  # of values
        replace(q, heads=4),  # other numbers of heads
        replace(q, heads=1),
        replace(q, own_weights=True),
    ):
        assert fused(Y, norm, k, rope_q, rope_k, attend) == [norm, Attended(Attend(attend, rope_q, rope_k), (k,))]
    read = Add(attend.q, Y, Y)
    assert fused(Y, q, attend, read) == [q, Attended(Attend(attend)), read], "read later"
    assert fused(attend.q, q, attend)[0] == q, "the stage's result"
    assert fused(Y, q, q, attend) == [q, Attended(Attend(attend), (q,))], "twice"
    shared = replace(attend, shares_kv=True)
    assert fused(Y, q, rope_q, shared) == [q, Attended(Attend(shared, rope_q))], "keys are of another layer"
    unlike = replace(rope_k, table=turn_back)
    assert fused(Y, q, k, rope_q, unlike, attend)[:2] == [q, k], "rotations differ"
    assert fused(Y, rope_q, rope_k, q, k, attend) == [rope_q, rope_k, Attended(Attend(attend), (q, k))]


@pytest.mark.parametrize(
    ("kv_heads", "other_types", "context_tokens", "count"),
    [(1, {}, 512, 8), (1, {}, 4096, 8), (2, {}, 4096, 8), (1, {"attn_v": QuantType.Q6_K}, 4096, 9)],
)
def test_launches_of_a_layer_in_decode(
    tmp_path: Path, kv_heads: int, other_types: dict[str, QuantType], context_tokens: int, count: int
) -> None:
    """The launches are those that docs/internals/gpu-kernels.md lists."""
    types: dict[str, Any] = {"quant_type": QuantType.Q4_K, "other_types": other_types}
    build_tiny_model(tmp_path / "m.gguf", layers=4, heads=4, kv_heads=kv_heads, ffn=256, **types)
    assert launches_of_a_layer(tmp_path / "m.gguf", context_tokens) == count


def launches_of_a_layer(path: Path, context_tokens: int, as_type: QuantType | None = None) -> int:
    """Counts a layer's launches in decode of one row; `as_type` replaces the quant type of matrices."""
    model = Model.open(path)
    limits = StageLimits(32, 32, 4, context_tokens, 256)

    def launches(end: int) -> int:
        program = model.program(1, end)
        weights = {
            name: matmul.Weights((len(tensor.shape) > 1 and as_type) or tensor.quant_type, tensor.shape)
            for name, tensor in model.tensors_for(program).items()
        }
        return len(Plan(program, weights, limits).launches(Shape(1, 1, decode=True)))

    return launches(3) - launches(2)


def test_norms_of_heads_take_no_launch(tmp_path: Path) -> None:
    tiny = Tiny("qwen3", hidden=256, layers=4, head_dim=64, kv_heads=1, ffn=256, head_norms=True, tied=True)
    build_tiny(tmp_path / "m.gguf", tiny)
    assert launches_of_a_layer(tmp_path / "m.gguf", 4096, QuantType.Q4_K) == 8


@pytest.mark.parametrize("weighs_inputs", [False, True])
def test_norms_before_experts_write_what_these_read(weighs_inputs: bool) -> None:
    """The norm writes floats for inputs that are weighed before they are quantized."""
    x, normed, out = (Buffer(name, 256) for name in ("x", "normed", "out"))
    options = ExpertOptions(weighs_inputs=weighs_inputs)
    experts = Moe(normed, out, "router", "gate", "up", "down", 4, 2, 256, options)
    program = program_of(x, out, RmsNorm(x, normed, "norm", 1e-5), experts)
    norm, _ = fuse_for_gpu(program, lambda name: QuantType.Q4_K if name == "router" else QuantType.Q4_0)
    other = ActivationFormat.F32 if weighs_inputs else ActivationFormat.Q8_32
    assert isinstance(norm, Norm) and norm.formats == {ActivationFormat.Q8_256, other}
