"""Checks that latent attention in decode and prefill, and products by head, give the CPU's bits on a GPU."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels import _native
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches.attention import check_attention, few_shared_bytes, many_shared_bytes
from llamaclust.kernels.cuda.launches.experts import by_head
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.launches.matmul import Experts, Product, Weights, expert_piece, multiply_experts
from llamaclust.kernels.cuda.runtime.device import LEAST_SHARED_BYTES, PLAIN_SHARED_BYTES
from llamaclust.kernels.cuda.runtime.sources import SRC
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention, Buffer, HeadMatMul
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import batch_of
from support.arithmetic.matmul_cases import check_equal_bits, random_activations, random_weights
from support.arithmetic.single_steps import program_of
from support.cuda.attending import LARGE, SMALL, Attender, in_parts, latent, sequences_of
from support.cuda.launching import Bench
from support.cuda.product_cases import LEVEL, count_of, generator_of, limits_of, load, quantized, segment_cols
from support.cuda.random_numbers import generator
from support.cuda.shim_device import LARGEST_GRID, ShimDevice

SHAPES = {
    "as deepseek": latent(20, 576, 512),
    "few heads": latent(3, 40, 32),
    "bytes": latent(5, 104, 96, KvType.Q8_0),
    "wide bytes": latent(17, 576, 512, KvType.Q8_0),
    "integers": latent(5, 50, 34, KvType.INT8),
    "tails": latent(4, 36, 18),
    "tails of bytes": latent(2, 50, 34, KvType.Q8_0),
}


WAYS: dict[str, int | None] = {"whole tiles": 0, "spans apart": None}
SINGLE_WAY = {("spans apart", "as deepseek"), ("whole tiles", "wide bytes")}
"""Cases that are left out, since wide shapes take seconds: each runs one way, narrow shapes of its KV type run both."""


@pytest.mark.parametrize(
    ("step", "slots"),
    [
        pytest.param(step, slots, id=f"{way}-{name}")
        for (way, slots), (name, step) in product(WAYS.items(), SHAPES.items())
        if (way, name) not in SINGLE_WAY
    ],
)
def test_decoding_and_prefill(bench: Bench, tmp_path: Path, step: Attention, slots: int | None) -> None:
    attender = Attender(bench, step, LARGE if slots is None else SMALL, slots)
    long, short = told = sequences_of(tmp_path, step, (525, 24), generator())
    for one, rows in zip(told, (505, 3), strict=True):
        attender.fill(one, rows)
    attender.check([(short, range(3, 20)), (long, range(505, 506))])
    attender.check([(long, range(506, 524))])
    attender.check([(long, range(524, 525)), (short, range(20, 21))], one_row_each=True)
    assert not any("few" in kernel for kernel in attender.launched)
    assert any("latent" in kernel for kernel in attender.launched)


@pytest.mark.parametrize("queries", [4, 8])
@pytest.mark.parametrize("step", SHAPES.values(), ids=SHAPES)
def test_heads_in_parts(bench: Bench, tmp_path: Path, step: Attention, queries: int) -> None:
    """Decode divides heads on a GPU that would be idle, and value channels into slices if there are enough."""
    long, short = told = sequences_of(tmp_path, step, (516, 20), generator())
    attender = Attender(bench, step, in_parts(step, queries, rows=2), 0 if step.kv_type is KvType.F16 else None)
    for one, rows in zip(told, (513, 18), strict=True):
        attender.fill(one, rows)
    attender.launched.clear()
    for at in (513, 514):
        attender.check([(long, range(at, at + 1)), (short, range(at - 495, at - 494))], one_row_each=True)
        assert attender.slices == (4 if step.value_dim == 512 else 1)
    assert f"attention.latent.few_{step.kv_type}_{4 if step.heads <= 4 else queries}" in attender.launched
    assert not any("latent.latent" in kernel for kernel in attender.launched)
    attender.check([(long, range(515, 516))])
    assert any("latent.latent" in kernel for kernel in attender.launched)


@pytest.mark.parametrize("kv_type", KvType)
def test_what_is_no_number_stays_in_its_rows(bench: Bench, tmp_path: Path, kv_type: KvType) -> None:
    step = latent(4, 64, 64, kv_type)
    (told,) = sequences_of(tmp_path, step, (40,), generator())
    rows = told.rows.copy()
    rows[37, step.q.width] = np.nan
    found = Attender(bench, step).run(batch_of([([0] * 40, range(40), told.table)]), rows)
    check_equal_bits(found[:37], told.wanted[:37])
    assert np.isnan(found[37:]).all()


def test_widths_that_fit_every_gpu() -> None:
    for kv_type in KvType:
        assert many_shared_bytes(latent(128, 576, 512, kv_type), 16) + 1024 <= LEAST_SHARED_BYTES
        assert few_shared_bytes(latent(128, 576, 512, kv_type), 8) + 1024 <= PLAIN_SHARED_BYTES
    wide = latent(2, 640, 512)
    with pytest.raises(
        ModelFileError, match="keys and values have 640 and 512 channels; GPUs support at most 576 and 512"
    ):
        check_attention(program_of(wide.q, wide.out, wide))


@pytest.mark.parametrize("kind", [QuantType.Q4_K, QuantType.Q8_0, QuantType.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("heads", "rows"), [(3, 1), (5, 18), (2, 70)])
def test_products_by_head(bench: Bench, kind: QuantType, heads: int, rows: int) -> None:
    width, cols, bucket = 18, 2 * segment_cols(kind), rows + 3
    source = generator_of(kind, heads, rows)
    loaded = [load(bench, kind, random_weights(source, kind, width, cols), width, cols) for _ in range(heads)]
    weights = Weights(kind, (heads, width, cols), bench.put(np.concatenate([one.memory.view for one in loaded])).at())
    x, piece = random_activations(source, rows * heads, cols), expert_piece(bucket * heads, heads)
    most_items = heads * -(-bucket // piece)
    items, count, places = (bench.room(size).at() for size in (12 * most_items, 4, 4 * bucket * heads))
    lines, out = (
        Experts(items, count, places, most_items, piece, 1),
        bench.put(np.zeros((rows * heads, width), np.float32)),
    )
    bench.device.launch(by_head(heads, lines, RowCount(bucket, count_of(bench, rows))))
    activations = quantized(bench, weights, x, bucket * heads)
    bench.device.launch(
        multiply_experts([Product(weights, np.uint64(0), out.at())], activations, lines, limits_of(bench, 4))
    )
    wanted = np.stack([_native.matmul(LEVEL, one.on_cpu, x[head::heads]) for head, one in enumerate(loaded)], axis=1)
    check_equal_bits(bench.get(out, (rows, heads, width)), wanted, kind)


@pytest.mark.parametrize("kind", [QuantType.Q4_K, QuantType.Q8_0], ids=lambda kind: kind.name)
def test_grids_of_a_long_prompt_with_many_heads(kind: QuantType) -> None:
    heads, rows = 128, 4128
    x, out = Buffer("x", heads * 512), Buffer("out", heads * 128)
    step = HeadMatMul(x, out, "w", heads)
    plan = Plan(program_of(x, out, step), {"w": Weights(kind, step.shape)}, StageLimits(rows, 1, 1, rows, 1))
    launches = plan.launches(Shape(rows, 1, decode=False))
    assert any("quantize" in launch.kernel for launch in launches)
    for launch in launches:
        assert all(size <= most for size, most in zip(launch.grid, LARGEST_GRID, strict=True)), launch


def test_lanes_that_change_places_are_noticed(tmp_path: Path, build_shim: Callable[..., Path]) -> None:
    """Another order of additions over every sixteenth position changes the result's bits."""
    for path in (SRC / "attention").iterdir():
        shutil.copy(path, tmp_path)
    kernels, text = tmp_path / "latent.cu", (SRC / "attention" / "latent.cu").read_text()
    line = "for (int begin = 0; begin < end; begin += kBlockTokens) {"
    assert text.count(line) == 1 and text.count("\nLATENT(") == 4
    swapped = "for (int begin = (end - 1) / 16 * 16; begin >= 0; begin -= kBlockTokens) {"
    kernels.write_text(
        re.sub(r"^(?:LATENT|FEW)\((?!f16, 16,).*\n", "", text.replace(line, swapped), flags=re.MULTILINE)
    )
    device = ShimDevice(build_shim({"attention.latent": kernels, "attention.rows": tmp_path / "rows.cu"}))
    step = latent(4, 40, 32)
    (told,) = sequences_of(tmp_path, step, (320,), generator())
    with Bench(device) as bench:
        attender = Attender(bench, step)
        attender.fill(told, 300)
        batch = batch_of([([0] * 20, range(300, 320), told.table)])
        found = attender.run(batch, told.rows[300:])
    device.close()
    assert (found.view(np.uint32) != told.wanted[300:].view(np.uint32)).any()
    np.testing.assert_allclose(found, told.wanted[300:], rtol=1e-3, atol=1e-5)
