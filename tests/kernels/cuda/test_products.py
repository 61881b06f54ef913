"""Checks that matrix products of every quant type give the CPU's bits, for few rows, many rows and experts' lines."""

from __future__ import annotations

import numpy as np
import pytest

from llamaclust.kernels import _native
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.launches.matmul import (
    _MODULE_OF,
    Experts,
    Product,
    Weights,
    embed,
    kernel_name,
    multiply,
    multiply_experts,
)
from llamaclust.kernels.cuda.runtime.device import NULL, PLAIN_SHARED_BYTES, Launch
from llamaclust.model.quant_types import QuantType
from support.arithmetic.matmul_cases import FLOAT_TYPES, TYPES, check_equal_bits, random_activations, random_weights
from support.arithmetic.single_steps import Weight
from support.cuda.exact import tiles_of
from support.cuda.launching import Bench
from support.cuda.product_cases import (
    LEVEL,
    count_of,
    generator_of,
    limits_of,
    load,
    none_numbers,
    products,
    quantized,
    segment_cols,
)

SHAPES = [(1, 1), (33, 3), (16, 5), (70, 2), (17, 35)]
"""Rows of weights and segments; some tiles and groups of segments are full, others not."""
ROWS = {(33, 3): (1, 2, 5, 8, 11, 16, 40, 70), (17, 35): (1, 8, 65)}


def test_every_type_of_the_cpu_has_kernels() -> None:
    assert set(_MODULE_OF) == set(TYPES)
    assert len({kernel_name("gemv", kind) for kind in TYPES}) == len(TYPES)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_products_have_the_bits_of_the_cpu(bench: Bench, kind: QuantType) -> None:
    for out_rows, segments in SHAPES:
        cols = segments * segment_cols(kind)
        generator = generator_of(kind, out_rows, cols)
        loaded = load(bench, kind, random_weights(generator, kind, out_rows, cols), out_rows, cols)
        bias = random_activations(generator, 1, out_rows)[0]
        for rows in ROWS.get((out_rows, segments), (3, 66)):
            x = random_activations(generator, rows, cols)
            none_numbers(x, segment_cols(kind))
            expected = _native.matmul(LEVEL, loaded.on_cpu, x, 1, bias)
            got = products(bench, loaded.weights, x, bench.put(bias), sms=(1, 4, 64)[rows % 3], bucket=rows + rows % 2)
            check_equal_bits(got, expected, kind, out_rows, cols, rows)


@pytest.mark.parametrize(
    "kind",
    [QuantType.Q4_K, QuantType.Q6_K, QuantType.Q5_1, QuantType.MXFP4, QuantType.F16, QuantType.F32],
    ids=lambda kind: kind.name,
)
@pytest.mark.parametrize("segments", [1, 3, 9, 22])
def test_warps_pass_totals_on_and_blocks_go_through_tiles(bench: Bench, kind: QuantType, segments: int) -> None:
    """Covers more tiles than blocks, with fewer and with more pieces than warps."""
    out_rows, cols = 275, segments * segment_cols(kind)
    generator = generator_of(kind, cols)
    loaded = load(bench, kind, random_weights(generator, kind, out_rows, cols), out_rows, cols)
    for rows in (1, 7, 13):
        x = random_activations(generator, rows, cols)
        expected = _native.matmul(LEVEL, loaded.on_cpu, x)
        check_equal_bits(products(bench, loaded.weights, x, sms=1), expected, kind, cols, rows)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FLOAT_TYPES], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [65, 128, 129])
def test_blocks_of_128_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: QuantType, rows: int) -> None:
    """Blocks have 128 rows if every multiprocessor still has a block; the last block may have as few as one row."""
    if bench.device.compute_capability != (9, 0):
        pytest.skip("compute capability 9.0 alone has them")
    out_rows, cols, launched, launch = 137, 2 * segment_cols(kind), list[Launch](), bench.device.launch
    generator = generator_of(kind, rows)
    loaded = load(bench, kind, random_weights(generator, kind, out_rows, cols), out_rows, cols)
    x = random_activations(generator, rows, cols)
    none_numbers(x, segment_cols(kind))
    expected = _native.matmul(LEVEL, loaded.on_cpu, x)

    def record(one: Launch) -> None:
        launched.append(one)
        launch(one)

    monkeypatch.setattr(bench.device, "launch", record)
    for sms, wanted in ((2, (2 if rows <= 128 else 4, "gemm_wide")), (5, (None, "gemm"))):
        check_equal_bits(products(bench, loaded.weights, x, sms=sms), expected, kind, rows, sms)
        assert launched[-1].kernel == kernel_name(wanted[1], kind)
        assert wanted[0] in (None, launched[-1].grid[0] * launched[-1].grid[1])


GPUS = [
    LaunchLimits(30, 48 << 10, (6, 1)),
    LaunchLimits(84, 99 << 10, (8, 6)),
    LaunchLimits(132, 227 << 10, (9, 0)),
    LaunchLimits(170, 99 << 10, (12, 0)),
]


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_blocks_fit_on_any_gpu_and_are_at_most_as_many_as_it_runs(gpu: LaunchLimits) -> None:
    has_bulk_copies = gpu.compute_capability >= (9, 0)
    for kind in set(TYPES) - set(FLOAT_TYPES):
        weights = Weights(kind, (64000, 4096))
        launch = multiply([Product(weights, NULL, NULL)], NULL, RowCount(1, NULL), gpu)
        assert launch.shared_bytes + 576 <= (gpu.shared_bytes if has_bulk_copies else PLAIN_SHARED_BYTES)
        blocks, left = divmod(launch.grid[1], gpu.sms)
        assert not left and blocks in ((1, 2) if has_bulk_copies else (3, 4, 5))
        assert blocks * (launch.shared_bytes + 1600) <= gpu.shared_bytes + 1024


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.compute_capability >= (9, 0)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_teams_of_float_products_fit_twice_on_a_multiprocessor(gpu: LaunchLimits, rows: int) -> None:
    for kind in FLOAT_TYPES:
        for out_rows in (2048, 4096, 64000):
            product = Product(Weights(kind, (out_rows, 4096)), NULL, NULL)
            launch = multiply([product], NULL, RowCount(rows, NULL), gpu)
            assert launch.grid[1] <= gpu.sms and launch.block[0] * launch.block[1] <= 128
            assert launch.grid[1] * launch.block[1] >= min(out_rows // 16, gpu.sms)
            assert 2 * (launch.shared_bytes + 1024) <= gpu.shared_bytes + 1024


@pytest.mark.parametrize(
    ("rows", "cols", "stages", "kept_bytes"), [(4096, 4096, 2, 2560), (4096, 2048, 1, 0), (4000, 11008, 4, 2560)]
)
def test_a_block_has_memory_for_no_more_pieces_than_it_takes(
    rows: int, cols: int, stages: int, kept_bytes: int
) -> None:
    launch = multiply([Product(Weights(QuantType.Q4_K, (rows, cols)), NULL, NULL)], NULL, RowCount(1, NULL), GPUS[2])
    assert launch.shared_bytes == 8 * (stages * (16 * 144 + 8) + kept_bytes)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_weights_that_are_no_numbers(bench: Bench, kind: QuantType) -> None:
    cols = 2 * segment_cols(kind)
    generator = generator_of(kind)
    data = bytearray(random_weights(generator, kind, 20, cols))
    width = kind.info.row_bytes(cols)
    data[2 * width : 3 * width] = bytes([255]) * width
    data[5 * width : 6 * width] = generator.integers(0, 256, width, dtype=np.uint8).tobytes()
    loaded = load(bench, kind, bytes(data), 20, cols)
    x = random_activations(generator, 67, cols)
    expected = _native.matmul(LEVEL, loaded.on_cpu, x)
    check_equal_bits(products(bench, loaded.weights, x[:3]), expected[:3], "few")
    check_equal_bits(products(bench, loaded.weights, x), expected, "many")


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [2, 66])
def test_one_wrong_bit_of_a_weight_is_noticed(bench: Bench, kind: QuantType, rows: int) -> None:
    cols = 3 * segment_cols(kind)
    generator = generator_of(kind, rows)
    loaded = load(bench, kind, random_weights(generator, kind, 16, cols), 16, cols)
    x = random_activations(generator, rows, cols)
    before = products(bench, loaded.weights, x)
    damaged = loaded.memory.view.copy()
    damaged[4 * 9 + (kind in FLOAT_TYPES)] ^= 4  # the first k-group of row 9
    tiles = bench.put(damaged).at()
    after = products(bench, Weights(kind, (16, cols), tiles), x)
    differ = (before.view(np.uint32) != after.view(np.uint32)).any(0)
    wrong = 2 if kind in (QuantType.F16, QuantType.BF16) else 9  # columns of 16 halves take half the bytes
    assert list(np.flatnonzero(differ)) == [wrong]


@pytest.mark.parametrize("kind", [QuantType.Q4_K, QuantType.Q5_1, QuantType.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bias_rows", [0, 1, 16], ids=["no bias", "rows", "tiles"])
@pytest.mark.parametrize(("piece", "divisor"), [(8, 1), (8, 2), (64, 2)])
def test_lines_of_experts(bench: Bench, kind: QuantType, piece: int, divisor: int, bias_rows: int) -> None:
    experts, rows, cols, lines = 19, 275, 2 * segment_cols(kind), 90
    generator = generator_of(kind, piece, divisor)
    loaded = [load(bench, kind, random_weights(generator, kind, rows, cols), rows, cols) for _ in range(experts)]
    tiles = bench.put(np.concatenate([one.memory.view for one in loaded])).at()
    x = random_activations(generator, lines // divisor, cols)
    choice = generator.integers(0, experts, lines)
    mixed = generator.permutation(lines)  # lines of an expert come in any order
    order = mixed[np.argsort(choice[mixed], kind="stable")].astype(np.int32)
    items = []
    for expert in range(experts):
        first, n = int((choice < expert).sum()), int((choice == expert).sum())
        items += [(expert, first + at, min(piece, n - at)) for at in range(0, n, piece)]
    table = np.full((len(items) + 2, 3), -1, np.int32)
    table[: len(items)] = items
    out = bench.put(np.zeros((lines, rows), np.float32))
    sizes = len(table), piece, divisor, max(1, bias_rows)
    grouped = Experts(bench.put(table).at(), count_of(bench, len(items)), bench.put(order).at(), *sizes)
    bias = generator.standard_normal((experts, rows), np.float32)
    stored = {0: None, 1: bias, 16: tiles_of(Weight(bias))[0]}[bias_rows]
    weights = Weights(kind, (experts, rows, cols), tiles)
    activations = quantized(bench, weights, x, len(x))
    at = np.uint64(0) if stored is None else bench.put(stored).at()
    bench.device.launch(multiply_experts([Product(weights, at, out.at())], activations, grouped, limits_of(bench, 1)))
    expected = np.stack([_native.matmul(LEVEL, one.on_cpu, x) for one in loaded])  # [experts, rows of x, rows]
    wanted = expected[choice, np.arange(lines) // divisor]
    check_equal_bits(bench.get(out, (lines, rows)), wanted + bias[choice] if bias_rows else wanted, items)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_embedding_rows(bench: Bench, kind: QuantType) -> None:
    cols = 5 * segment_cols(kind)
    generator = generator_of(kind, "rows")
    loaded = load(bench, kind, random_weights(generator, kind, 37, cols), 37, cols)
    ids = np.array([36, 0, 15, 16, 16, 5], np.int32)
    out = bench.put(np.full((len(ids) + 1, cols), np.float32(7)))
    bench.device.launch(
        embed(loaded.weights, bench.put(ids).at(), RowCount(len(ids) + 1, count_of(bench, len(ids))), out.at())
    )
    got = bench.get(out, (len(ids) + 1, cols))
    check_equal_bits(got[:-1], _native.dequantize(LEVEL, loaded.on_cpu)[ids], kind)
    assert (got[-1] == 7).all()
