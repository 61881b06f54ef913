"""Checks that row kernels give the CPU backend's bits, for odd widths, all magnitudes, infinities and NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels import _native
from llamaclust.kernels.cuda.executor.emit import position_factors
from llamaclust.kernels.cuda.launches import elementwise, mixing
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import Buffer as DeviceBuffer
from llamaclust.kernels.cuda.runtime.device import Scalar
from llamaclust.kernels.cuda.runtime.sources import modules, whole_text
from llamaclust.model.program import (
    Activate,
    Add,
    Buffer,
    Clamp,
    Embed,
    GaussianTopK,
    Join,
    LayerNorm,
    MatchMagnitude,
    Mix,
    Mul,
    PositionScale,
    RmsNorm,
    Rope,
    RopeTable,
    Scale,
    ScaleByWeight,
    SelectRows,
    SigmoidGate,
    SiluMul,
    Slice,
    SoftCap,
    Step,
)
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import ActivationFunction, RopeStyle
from support.arithmetic.batches import batch_of
from support.arithmetic.single_steps import Weight, program_of, rows_at
from support.cuda.exact import Float32, awkward, on_cpu, random_source, same_bits, tiles_of
from support.cuda.launching import Bench
from support.cuda.row_cases import BUCKET, ROWS, one_part, rows_of, two_parts
from support.cuda.shim_device import ShimDevice

WIDTHS = [1, 7, 64, 100, 1023, 1300, 4096, 5001]

Arg = DeviceBuffer | Scalar | int | float


def count(bench: Bench) -> RowCount:
    return RowCount(BUCKET, rows_of(bench).at())


def pieces(width: int) -> tuple[int, int]:
    return -(-width // 1024), BUCKET


BuildStep = Callable[[Buffer, Buffer], Step]
TWO_MATRICES: dict[str, BuildStep] = {
    "add": lambda a, b: Add(a, b, b),
    "mul": lambda a, b: Mul(a, b, b),
    "silu_mul": lambda a, b: SiluMul(a, b, b),
}
ONE_MATRIX: dict[str, tuple[tuple[float, ...], BuildStep]] = {
    "scale": ((0.1,), lambda a, out: Scale(a, out, 0.1)),
    "soft_cap": ((30.0,), lambda a, out: SoftCap(a, out, 30.0)),
    **{str(kind): ((), partial(Activate, function=kind)) for kind in ActivationFunction},
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel", TWO_MATRICES)
def test_steps_of_two_matrices(bench: Bench, kernel: str, width: int) -> None:
    x = awkward(random_source(), ROWS, 2 * width)
    x[4::5, width:] = np.roll(x[4::5, :width], 1, 1)  # infinity minus infinity, and times zero
    left, right = bench.put(x[:, :width]), bench.put(x[:, width:])
    bench.run(f"elementwise.rows.{kernel}_rows", pieces(width), 256, left, right, width, rows_of(bench), left)
    same_bits(bench.get(left, (ROWS, width)), two_parts(width, TWO_MATRICES[kernel], x))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel", ONE_MATRIX)
def test_steps_of_one_matrix(bench: Bench, kernel: str, width: int) -> None:
    x = awkward(random_source(), ROWS, width)
    (factors, step), out = ONE_MATRIX[kernel], bench.room(x.nbytes)
    bench.run(f"elementwise.rows.{kernel}_rows", pieces(width), 256, bench.put(x), *factors, width, rows_of(bench), out)
    same_bits(bench.get(out, (ROWS, width)), one_part(width, step, x))


@pytest.mark.parametrize("kind", ActivationFunction)
def test_functions_of_any_float(bench: Bench, kind: ActivationFunction) -> None:
    """Covers 0.001% of all bit patterns, and many numbers between -110 and 95."""
    source = random_source()
    bits = source.integers(0, 1 << 32, (ROWS, 4096), np.uint32)
    bits[:4] = (source.uniform(-110, 95, (4, 4096)).astype(np.float32)).view(np.uint32)
    x = bits.view(np.float32)
    out = bench.room(x.nbytes)
    bench.run(f"elementwise.rows.{kind}_rows", pieces(4096), 256, bench.put(x), 4096, rows_of(bench), out)
    same_bits(bench.get(out, x.shape), one_part(4096, partial(Activate, function=kind), x))


def norm_cases(width: int) -> tuple[Float32, Float32, Float32]:
    source = random_source()
    return awkward(source, ROWS, width), *source.standard_normal((2, width), np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(bench: Bench, width: int) -> None:
    x, weight, _ = norm_cases(width)
    there = bench.put(x)
    bench.run(
        "elementwise.norms.rms_norm", (1, BUCKET), 256, there, bench.put(weight), 1e-5, width, rows_of(bench), there
    )
    wanted = one_part(width, lambda a, out: RmsNorm(a, out, "w", 1e-5), x, w=weight)
    same_bits(bench.get(there, x.shape), wanted)


@pytest.mark.parametrize(("parts", "width"), [(1, 1), (3, 100), (8, 64), (9, 128), (32, 37), (2, 600)])
def test_rms_norm_of_parts(bench: Bench, parts: int, width: int) -> None:
    x, weight, _ = norm_cases(parts * width)
    out, grid = bench.room(x.nbytes), (-(-parts // 8), BUCKET)
    args = bench.put(x), bench.put(weight[:width]), 1e-6, parts, width, rows_of(bench), out
    bench.run("elementwise.norms.rms_norm_parts", grid, 256, *args)
    step = lambda a, b: RmsNorm(a, b, "w", 1e-6, parts)  # noqa: E731
    same_bits(bench.get(out, x.shape), one_part(parts * width, step, x, w=weight[:width]))


@pytest.mark.parametrize(("groups", "width"), [(1, 64), (1, 1300), (3, 100), (17, 48), (2, 5001)])
def test_rms_norm_of_groups_with_weights_of_their_own(bench: Bench, groups: int, width: int) -> None:
    x, weight, _ = norm_cases(groups * width)
    tiles, _ = tiles_of(Weight(weight.reshape(groups, width)))
    whole, there = Buffer("x", groups * width), bench.put(x)
    step = RmsNorm(whole, whole, "w", 1e-5, groups, own_weights=True)
    bench.device.launch(elementwise.rms_norm(step, there.at(), bench.put(tiles).at(), there.at(), count(bench)))
    wanted = on_cpu(
        program_of(whole, whole, step), {"w": Weight(weight.reshape(groups, width))}, rows_at(range(ROWS)), x
    )
    same_bits(bench.get(there, x.shape), wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(bench: Bench, width: int) -> None:
    x, weight, bias = norm_cases(width)
    there = bench.put(x)
    args = there, bench.put(weight), bench.put(bias), 1e-5, width, rows_of(bench), there
    bench.run("elementwise.norms.layer_norm", (1, BUCKET), 256, *args)
    wanted = one_part(width, lambda a, out: LayerNorm(a, out, "w", "b", 1e-5), x, w=weight, b=bias)
    same_bits(bench.get(there, x.shape), wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_sigmoid_gate(bench: Bench, width: int) -> None:
    x, weight, _ = norm_cases(width)
    y = awkward(random_source(), ROWS, 96)
    hidden, a, b = Buffer("x", width + 96), Buffer("a", width), Buffer("b", 96)
    steps = Slice(hidden, a, 0), Slice(hidden, b, width), SigmoidGate(a, b, b, "w")
    wanted = on_cpu(program_of(hidden, b, *steps), {"w": Weight(weight)}, rows_at(range(ROWS)), np.hstack([x, y]))
    there = bench.put(y)
    args = bench.put(x), bench.put(weight), there, width, 96, rows_of(bench), there
    bench.run("elementwise.norms.sigmoid_gate", (1, BUCKET), 256, *args)
    same_bits(bench.get(there, y.shape), wanted)


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize(("heads", "head_dim", "pairs"), [(1, 2, 1), (4, 64, 32), (5, 100, 33), (3, 256, 64)])
def test_rope(bench: Bench, style: RopeStyle, heads: int, head_dim: int, pairs: int) -> None:
    source = random_source()
    x = awkward(source, ROWS, heads * head_dim)
    first = int(source.integers(0, 4000))
    table = RopeTable(tuple(10000.0 ** (-np.arange(pairs) / pairs)), 1.25)
    hidden = Buffer("x", heads * head_dim)
    program = program_of(hidden, hidden, Rope(hidden, heads, head_dim, style, table))
    wanted = on_cpu(program, {}, rows_at(range(first, first + ROWS)), x)
    rotation, rows, there = bench.room(ROWS * 8 * pairs), rows_of(bench), bench.put(x)
    positions = bench.put(np.arange(first, first + ROWS, dtype=np.int32))
    frequencies = bench.put(np.array(table.frequencies))
    args = positions, frequencies, np.float64(table.scale), pairs, rows, rotation
    bench.run("elementwise.rope.rotation", (-(-pairs // 64), BUCKET), 64, *args)
    grid = -(-heads * pairs // 256), BUCKET
    bench.run(
        "elementwise.rope.rope", grid, 256, there, rotation, heads, head_dim, pairs, int(style is RopeStyle.NEOX), rows
    )
    same_bits(bench.get(there, x.shape), wanted)


def test_angles_of_long_contexts(bench: Bench) -> None:
    """Angles outside of the supported range are NaN."""
    source = random_source()
    positions = source.integers(0, 1 << 20, ROWS).astype(np.int32)
    frequencies = np.concatenate(
        [source.uniform(0, 1, 90), np.arange(5) * np.pi / 4, [1e3, 1e9, np.nan, 1e-300, 5e-324]]
    )
    out = bench.room(ROWS * 8 * 100)
    args = bench.put(positions), bench.put(frequencies), np.float64(1), 100, rows_of(bench), out
    bench.run("elementwise.rope.rotation", (2, BUCKET), 64, *args)
    wanted = [[_native.sincos(float(position * f)) for f in frequencies] for position in positions]
    sine, cosine = np.array(wanted).astype(np.float32).transpose(2, 0, 1)
    same_bits(bench.get(out, (ROWS, 200)), np.hstack([cosine, sine]))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("x_width", "start", "width"), [(100, 37, 20), (4096, 1024, 2048), (3000, 1, 2999), (5, 4, 1)])
def test_slice_and_join(bench: Bench, x_width: int, start: int, width: int, heads: int) -> None:
    """Slices channels of each head, and joins them again with the preceding channels."""
    x = awkward(random_source(), ROWS, heads * x_width)
    out, joined, there, rows = bench.room(ROWS * heads * width * 4), bench.room(x.nbytes), bench.put(x), count(bench)
    parts = x.reshape(ROWS, heads, x_width)
    chosen, rest = parts[:, :, start : start + width].reshape(ROWS, -1), parts[:, :, :start].reshape(ROWS, -1)
    whole = Buffer("x", heads * x_width)
    step = Slice(whole, Buffer("out", heads * width), start, heads)
    bench.device.launch(elementwise.slice_rows(step, there.at(), out.at(), rows))
    same_bits(bench.get(out, chosen.shape), chosen)
    join = Join(Buffer("rest", heads * start), step.out, Buffer("joined", heads * (start + width)), heads)
    bench.device.launch(elementwise.join_rows(join, bench.put(rest).at(), out.at(), joined.at(), rows))
    same_bits(bench.get(joined, (ROWS, join.out.width)), parts[:, :, : start + width].reshape(ROWS, -1))


@pytest.mark.parametrize("width", WIDTHS)
def test_scale_by_a_weight(bench: Bench, width: int) -> None:
    x, number = awkward(random_source(), ROWS, width), random_source().standard_normal(1, np.float32)
    there, rows = bench.put(x), count(bench)
    out = bench.room(x.nbytes)
    hidden, channels = Buffer("x", width), random_source().standard_normal(width, np.float32)
    for weight in (number, channels):
        step = ScaleByWeight(hidden, hidden, "w", by_channel=len(weight) > 1)
        bench.device.launch(mixing.scale_by_weight(step, there.at(), bench.put(weight).at(), out.at(), rows))
        wanted = on_cpu(program_of(hidden, hidden, step), {"w": Weight(weight)}, rows_at(range(ROWS)), x)
        same_bits(bench.get(out, x.shape), wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_clamps(bench: Bench, width: int) -> None:
    x, hidden = awkward(random_source(), ROWS, width), Buffer("x", width)
    there, rows, out = bench.put(x), count(bench), bench.room(x.nbytes)
    for low, high in ((-0.5, 0.75), (0.0, np.inf), (-np.inf, -1e-3)):
        limits = {name: np.array([limit], np.float32) for name, limit in (("a", low), ("b", high))}
        places = [bench.put(limit).at() for limit in limits.values()]
        bench.device.launch(elementwise.elementwise("clamp", (there.at(), *places), out.at(), width, rows))
        program = program_of(hidden, hidden, Clamp(hidden, hidden, "a", "b"))
        wanted = on_cpu(program, {name: Weight(limit) for name, limit in limits.items()}, rows_at(range(ROWS)), x)
        same_bits(bench.get(out, x.shape), wanted)


@pytest.mark.parametrize(("width", "x_parts", "parts"), [(1, 1, 1), (64, 4, 4), (700, 1, 3), (37, 5, 2)])
@pytest.mark.parametrize("first", [0, 1])
def test_mixed_parts(bench: Bench, width: int, x_parts: int, parts: int, first: int) -> None:
    """Covers sums with coefficients and without."""
    source, rows, sizes = random_source(), count(bench), (x_parts * width, parts * width, x_parts * parts)
    data = [awkward(source, ROWS, size) for size in sizes]
    places, (x, y, factors) = list(map(bench.put, data)), map(Buffer, ("a", "b", "c"), sizes)
    hidden = Buffer("x", sum(sizes))
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    slices = [Slice(hidden, part, start) for part, start in zip((x, y, factors), starts, strict=True)]
    for step in (Mix(x, y, y, width, factors, 0.7, first), Mix(x, y, y, width, first=first)):
        out, reads = bench.put(data[1]), [places[0].at(), places[1].at(), places[2].at()]
        reads[1] = out.at()  # in place
        bench.device.launch(mixing.mix(step, reads if step.coefficients else reads[:2], out.at(), rows))
        wanted = on_cpu(program_of(hidden, y, *slices, step), {}, rows_at(range(ROWS)), np.concatenate(data, axis=1))
        same_bits(bench.get(out, data[1].shape), wanted)


@pytest.mark.parametrize(("width", "parts"), [(1, 1), (64, 3), (100, 9), (2048, 3)])
def test_magnitudes(bench: Bench, width: int, parts: int) -> None:
    source, rows = random_source(), count(bench)
    like, data = awkward(source, ROWS, width), awkward(source, ROWS, parts * width)
    hidden, y, x = Buffer("x", (parts + 1) * width), Buffer("a", width), Buffer("b", parts * width)
    step, there = MatchMagnitude(x, y, x, 1e-5), bench.put(data)
    bench.device.launch(mixing.match_magnitude(step, there.at(), bench.put(like).at(), there.at(), rows))
    program = program_of(hidden, x, Slice(hidden, y, 0), Slice(hidden, x, width), step)
    same_bits(bench.get(there, data.shape), on_cpu(program, {}, rows_at(range(ROWS)), np.hstack([like, data])))


@pytest.mark.parametrize("width", WIDTHS)
def test_activations_above_a_quantile(bench: Bench, width: int) -> None:
    x, hidden = awkward(random_source(), ROWS, width), Buffer("x", width)
    for factor in (1.6448533535003662, -0.3):
        there = bench.put(x)
        step = GaussianTopK(hidden, hidden, factor)
        bench.device.launch(mixing.gaussian_top_k(step, there.at(), there.at(), count(bench)))
        wanted = one_part(width, lambda a, b, by=factor: GaussianTopK(a, b, by), x)  # type: ignore[misc]
        same_bits(bench.get(there, x.shape), wanted)


@pytest.mark.parametrize("offset", [0, 1, 4, 12])
@pytest.mark.parametrize("width", WIDTHS)
def test_scale_by_position(bench: Bench, width: int, offset: int) -> None:
    """The last row is at the last position of the context, for which the table has the last factor."""
    x, hidden, first = awkward(random_source(), ROWS, width), Buffer("x", width), 23
    there, rows, context_tokens = bench.put(x), count(bench), first + ROWS
    step = PositionScale(hidden, hidden, 0.7, 5, offset)
    wanted = on_cpu(program_of(hidden, hidden, step), {}, rows_at(range(first, context_tokens)), x)
    table = position_factors(step, context_tokens)
    assert len(table) == (context_tokens - 1 + offset) // 5 + 1
    positions = bench.put(np.arange(first, context_tokens, dtype=np.int32)).at()
    launch = elementwise.scale_by_position(step, there.at(), bench.put(table).at(), positions, there.at(), rows)
    bench.device.launch(launch)
    same_bits(bench.get(there, x.shape), wanted)


@pytest.mark.parametrize("width", [1, 100, 1300])
def test_select_rows(bench: Bench, width: int) -> None:
    x, chosen = awkward(random_source(), ROWS, width), np.array([0, 3, 4, 10], np.int32)
    hidden, out = Buffer("x", width), Buffer("out", width)
    batch = batch_of([([0] * ROWS, range(ROWS), range(1))], outputs=chosen)
    wanted = on_cpu(program_of(hidden, out, SelectRows(hidden, out), last=True), {}, batch, x)
    there, outputs = bench.room(4 * 4 * width), bench.put(np.array([4], np.int32))
    bench.run(
        "elementwise.rows.select_rows", pieces(width), 256, bench.put(x), width, bench.put(chosen), outputs, there
    )
    same_bits(bench.get(there, (4, width)), wanted)


@pytest.mark.parametrize("quant_type", [QuantType.F32, QuantType.F16, QuantType.BF16])
@pytest.mark.parametrize("width", [64, 100, 1300])
def test_rows_of_weights(bench: Bench, quant_type: QuantType, width: int) -> None:
    source = random_source()
    weight = Weight(np.clip(awkward(source, 50, width), -6e4, 6e4), quant_type)
    ids = source.integers(0, 50, ROWS).astype(np.int32)
    out = Buffer("out", width)
    tiles, tile_bytes = tiles_of(weight)
    there, rows, on_device = bench.room(ROWS * width * 4), rows_of(bench), bench.put(tiles)
    args = bench.put(ids), on_device, tile_bytes, width, rows, there
    bench.run(f"matmul.float.embed_{quant_type.name}", pieces(width), 256, *args)
    batch = batch_of([(ids, range(ROWS), range(1))])
    wanted = on_cpu(program_of(out, out, Embed(out, "w"), first=True), {"w": weight}, batch, None)
    same_bits(bench.get(there, (ROWS, width)), wanted)


WALK, LOW = "int i = threadIdx.x % kWarp; i < n; i += 64", "low = term(low, i);"
SWAPS = {
    "tree": {"int half = 16; half > 0; half /= 2": "int half = 1; half < 32; half *= 2"},
    "lanes": {WALK: "int i = 2 * (threadIdx.x % kWarp); i < n; i += 64", "i + 32": "i + 1"},
    "elements": {
        WALK: "int i = (n - 1) / 64 * 64 + int(threadIdx.x % kWarp); i >= 0; i -= 64",
        LOW: f"if (i < n) {LOW}",
    },
}


@pytest.mark.parametrize("swap", SWAPS)
def test_additions_that_change_places_are_noticed(tmp_path: Path, build_shim: Callable[..., Path], swap: str) -> None:
    """Changes each kind of order in a sum of ordinary numbers of both signs."""
    text = whole_text(modules()["elementwise.norms"])
    for before, after in SWAPS[swap].items():
        assert before in text
        text = text.replace(before, after)
    source = tmp_path / "norms.cu"
    source.write_text(text)
    x, ones = random_source().standard_normal((ROWS, 4096), np.float32), np.ones(4096, np.float32)
    wanted = one_part(4096, lambda a, out: LayerNorm(a, out, "w", "b", 1e-5), x, w=ones, b=ones)
    with Bench(ShimDevice(build_shim({"elementwise.norms": source}))) as bench:
        there, weight = bench.put(x), bench.put(ones)
        bench.run(
            "elementwise.norms.layer_norm", (1, BUCKET), 256, there, weight, weight, 1e-5, 4096, rows_of(bench), there
        )
        with pytest.raises(AssertionError):
            same_bits(bench.get(there, x.shape), wanted)
