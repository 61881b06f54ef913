"""Checks that attention on a GPU gives the CPU's bits for any heads, KV type, window, bias and batches."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.cuda.launches.attention import (
    AttentionBuffers,
    AttentionLaunches,
    brings_own,
    few_shared_bytes,
    likeness,
    many_shared_bytes,
    room_of,
    tile_rows,
)
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import Inputs
from llamaclust.kernels.cuda.runtime.device import LEAST_SHARED_BYTES, NULL, PLAIN_SHARED_BYTES
from llamaclust.kernels.cuda.runtime.sources import SRC
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from support.arithmetic.batches import batch_of
from support.arithmetic.matmul_cases import check_equal_bits
from support.cuda.attending import LARGE, SMALL, Attender, Told, attention, by_the_cpu, in_parts, latent, sequences_of
from support.cuda.launching import Bench
from support.cuda.random_numbers import generator
from support.cuda.shim_device import ShimDevice

SHAPES = {
    "as llama": attention(4, 1, 64),
    "one head each": attention(2, 2, 128),
    "as phi": attention(2, 1, 96, KvType.Q8_0),
    "eight heads": attention(8, 1, 80),
    "a tail of channels": attention(5, 1, 100, KvType.Q8_0),
    "as gemma": attention(2, 1, 256, soft_cap=20.0),
    "wide bytes": attention(8, 1, 256, KvType.Q8_0, soft_cap=20.0),
    "sixteen heads": attention(16, 1, 64, KvType.Q8_0),
    "nearly sixteen": attention(12, 1, 64),
    "many heads": attention(20, 1, 32, slopes=alibi_slopes(20)),
    "odd": attention(3, 1, 33, KvType.Q8_0, slopes=alibi_slopes(3)),
    "odd halves": attention(6, 2, 37),
    "widest": attention(2, 1, 512),
    "as gpt-oss": attention(8, 1, 64, sinks="sinks"),
    "sinks, bytes, cap": attention(3, 1, 80, KvType.Q8_0, soft_cap=20.0, sinks="sinks"),
    "widest bytes": attention(2, 1, 512, KvType.Q8_0),
    "sixteen wide heads": attention(16, 1, 256),
    "integers": attention(4, 1, 64, KvType.INT8),
    "integers, odd": attention(3, 1, 33, KvType.INT8, slopes=alibi_slopes(3), sinks="sinks"),
    "integers, wide": attention(12, 1, 256, KvType.INT8, soft_cap=20.0),
    "integers, many heads": attention(20, 1, 80, KvType.INT8),
}
GPUS = {"small": SMALL, "large": LARGE}


@pytest.mark.parametrize("step", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("slots", [0, None], ids=["whole tiles", "spans apart"])
def test_decoding_and_prefill(bench: Bench, tmp_path: Path, step: Attention, slots: int | None) -> None:
    """Covers rows before, at and after the end of a span, together and alone, with every kernel."""
    attender = Attender(bench, step, LARGE if slots is None else SMALL, slots)
    long, short = told = sequences_of(tmp_path, step, (525, 24), generator())
    for one, rows in zip(told, (505, 3), strict=True):
        attender.fill(one, rows)
    attender.check([(short, range(3, 20)), (long, range(505, 506))])
    attender.check([(long, range(506, 524))])
    attender.check([(long, range(524, 525)), (short, range(20, 21))], one_row_each=True)
    few = "few" in " ".join(attender.launched)
    assert few == (step.heads // step.kv_heads <= 16)
    assert any("tile" in kernel for kernel in attender.launched)


FEW = {name: step for name, step in SHAPES.items() if step.heads // step.kv_heads <= 16}


@pytest.mark.parametrize("step", FEW.values(), ids=FEW)
@pytest.mark.parametrize("slots", [0, None], ids=["whole tiles", "spans apart"])
def test_slices_of_values(bench: Bench, tmp_path: Path, step: Attention, slots: int | None) -> None:
    """GPUs with enough multiprocessors divide value channels into slices, for one and two spans; others do not."""
    long, short = told = sequences_of(tmp_path, step, (516, 20), generator())
    slices = -(-step.head_dim // 32)
    enough = LaunchLimits(3 * slices * step.kv_heads // 2 + 1, LEAST_SHARED_BYTES, (7, 5))  # for three items
    attender = Attender(bench, step, enough, slots)
    for one, rows in zip(told, (511, 17), strict=True):
        attender.fill(one, rows)
    attender.launched.clear()
    for at in (511, 512):
        attender.check([(long, range(at, at + 1)), (short, range(at - 494, at - 493))], one_row_each=True)
        assert attender.slices == slices
    attender.gpu = replace(enough, sms=-(-slices * step.kv_heads // 2))  # for one item
    attender.check([(short, range(19, 20))], one_row_each=True)
    assert attender.slices == slices
    attender.check([(long, range(513, 514)), (short, range(19, 20))], one_row_each=True)
    assert attender.slices == 1
    stores = any("store" in kernel for kernel in attender.launched)
    assert stores != brings_own(step), "keys and values are stored by the same kernel, where there is room for them"


PARTS = {
    "many heads": attention(20, 1, 32, slopes=alibi_slopes(20)),
    "as starcoder": attention(48, 1, 128),
    "odd": attention(38, 2, 37, sinks="sinks"),
    "bytes": attention(19, 1, 80, KvType.Q8_0, soft_cap=20.0),
    "integers": attention(17, 1, 100, KvType.INT8),
    "wide windows": attention(20, 1, 256, window=300),
}


@pytest.mark.parametrize("queries", [4, 8, 16])
@pytest.mark.parametrize("step", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("slots", [0, None], ids=["whole tiles", "spans apart"])
def test_heads_in_parts(bench: Bench, tmp_path: Path, step: Attention, queries: int, slots: int | None) -> None:
    """Decode divides heads that exceed a block of few queries if multiprocessors would be idle; prompts use tiles."""
    long, short = told = sequences_of(tmp_path, step, (516, 20), generator())
    attender = Attender(bench, step, in_parts(step, queries, rows=2), slots)
    for one, rows in zip(told, (513, 18), strict=True):
        attender.fill(one, rows)
    attender.launched.clear()
    for at in (513, 514):
        attender.check([(long, range(at, at + 1)), (short, range(at - 495, at - 494))], one_row_each=True)
    assert f"attention.few.few_{step.kv_type}_{queries}" in attender.launched
    assert not any("tile" in kernel for kernel in attender.launched)
    attender.check([(long, range(515, 516))])
    assert any("tile" in kernel for kernel in attender.launched)


@pytest.mark.parametrize("sinks", [None, "sinks"])
@pytest.mark.parametrize("kv_type", KvType)
def test_spans_merge_in_order(bench: Bench, tmp_path: Path, kv_type: KvType, sinks: str | None) -> None:
    """Covers four spans, some of which are computed separately if the workspace allows it."""
    step = attention(4, 1, 64, kv_type, sinks=sinks)
    (told,) = sequences_of(tmp_path, step, (1600,), generator())
    for slots, gpu in ((0, SMALL), (4, SMALL), (None, SMALL), (None, LaunchLimits(400, 200 << 10, (9, 0)))):
        attender = Attender(bench, step, gpu, slots)
        attender.fill(told, 1597)
        attender.check([(told, range(1597, 1598))], one_row_each=True)
        attender.check([(told, range(1598, 1600))])


@pytest.mark.parametrize("chunked", [False, True], ids=["windows", "chunks"])
@pytest.mark.parametrize("window", [1, 9, 300, 512, 520])
@pytest.mark.parametrize("kv_type", KvType)
def test_windows(bench: Bench, tmp_path: Path, kv_type: KvType, window: int, chunked: bool) -> None:
    """Covers windows in one span, at its edges and over two spans; blocks behind a window are absent."""
    step = attention(4, 2, 64, kv_type, window=window, sinks="sinks" if window % 2 else None, chunked=chunked)
    (told,) = sequences_of(tmp_path, step, (1060,), generator())
    attender = Attender(bench, step, LARGE)
    attender.fill(told, 1015)
    attender.check([(told, range(1015, 1016))], one_row_each=True)
    attender.check([(told, range(1016, 1023))])
    attender.check([(told, range(1023, 1025))])
    attender.check([(told, range(1025, 1060))])


@pytest.mark.parametrize("kv_type", KvType)
def test_random_batches(bench: Bench, tmp_path: Path, kv_type: KvType) -> None:
    """Sequences grow together by random numbers of rows, on a small and a large GPU in turn."""
    source = generator()
    step = attention(4, 2, 64, kv_type, soft_cap=30.0, slopes=alibi_slopes(4))
    told = sequences_of(tmp_path, step, (150, 90, 533), source)
    attender = Attender(bench, step)
    at = [0, 0, 500]
    attender.fill(told[2], 500)
    while any(start < len(one.rows) for start, one in zip(at, told, strict=True)):
        parts = []
        for n, one in enumerate(told):
            left = len(one.rows) - at[n]
            count = min(left, int(source.choice([0, 1, 2, 5, 33, 60])))
            if count:
                parts.append((one, range(at[n], at[n] + count)))
                at[n] += count
        attender.gpu = LARGE if attender.gpu == SMALL else SMALL
        if parts:
            attender.check(parts)


def test_shared_blocks(bench: Bench, tmp_path: Path) -> None:
    """Two sequences with the same beginning read the same blocks."""
    step = attention(4, 1, 64)
    first, other = sequences_of(tmp_path, step, (70, 6), generator())
    rows = np.concatenate([first.rows[:64], other.rows])
    second = Told(rows, (*first.table[:4], *other.table), by_the_cpu(tmp_path, step, rows))
    attender = Attender(bench, step)
    attender.fill(first, 64)
    attender.check([(first, range(64, 70)), (second, range(64, 70))])


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_what_is_no_number_stays_in_its_rows(bench: Bench, tmp_path: Path, kv_type: KvType, gpu: LaunchLimits) -> None:
    """Rows of a tile before a NaN keep their bits; rows that see the NaN are NaN."""
    step = attention(4, 1, 64, kv_type)
    (told,) = sequences_of(tmp_path, step, (40,), generator())
    rows = told.rows.copy()
    rows[37, -step.k.width :] = np.nan
    batch = batch_of([([0] * 40, range(40), told.table)])
    found = Attender(bench, step, gpu).run(batch, rows)
    check_equal_bits(found[:37], told.wanted[:37])
    assert np.isnan(found[37:]).all()


@pytest.mark.parametrize("kv_type", [KvType.Q8_0, KvType.INT8])
def test_a_key_that_is_no_number(bench: Bench, tmp_path: Path, kv_type: KvType) -> None:
    """Outputs that depend on an infinite key are NaN; earlier ones keep their bits."""
    step = attention(4, 1, 64, kv_type)
    (told,) = sequences_of(tmp_path, step, (560,), generator())
    rows = told.rows.copy()
    rows[550, step.q.width] = np.inf
    attender = Attender(bench, step)
    attender.fill(replace(told, rows=rows), 540)
    found = attender.run(batch_of([([0] * 20, range(540, 560), told.table)]), rows[540:])
    check_equal_bits(found[:10], told.wanted[540:550])
    assert np.isnan(found[10:]).all()


def test_shared_memory_is_what_every_gpu_has() -> None:
    """Kernels for heads of up to 256 channels take at most 48 KiB; only tiles of wider heads take more."""
    for kv_type in KvType:
        for head_dim in (64, 80, 100, 128, 256):
            step = attention(32, 8, head_dim, kv_type)
            sizes = [few_shared_bytes(step, queries) for queries in (1, 2, 4, 8, 16)]
            assert max(*sizes, many_shared_bytes(step, 16)) + 1024 <= PLAIN_SHARED_BYTES
        widest = attention(32, 8, 512, kv_type)
        assert many_shared_bytes(widest, 16) + 1024 <= LEAST_SHARED_BYTES
    assert tile_rows(attention(32, 8, 128), SMALL) == 4
    assert tile_rows(attention(32, 8, 128), LARGE) == 8


@pytest.mark.parametrize(
    ("step", "rows", "kernel", "blocks_of_rows"),
    [
        (latent(16, 576, 512), 1, "latent.few_f16_4", 4),
        (latent(16, 576, 512), 32, "latent.few_f16_8", 2),
        (latent(16, 576, 512), 64, "latent.latent_f16_16", 1),
        (latent(128, 576, 512), 1, "latent.few_f16_4", 32),
        (latent(128, 576, 512), 8, "latent.latent_f16_16", 8),
        (latent(128, 576, 512), 64, "latent.latent_f16_32", 4),
        (attention(48, 1, 128), 1, "few.few_f16_4", 12),
        (attention(48, 1, 128, KvType.INT8), 8, "few.few_int8_8", 6),
        (attention(48, 1, 128), 64, "tile.tile_f16_32", 2),
    ],
)
def test_heads_are_in_parts_where_a_gpu_would_be_idle(
    step: Attention, rows: int, kernel: str, blocks_of_rows: int
) -> None:
    """Decode alone divides heads; each row takes `blocks_of_rows` blocks, or more with slices and spans."""
    gpu, room = LaunchLimits(132, 227 << 10, (9, 0)), room_of((step,), 128, 512)
    inputs, buffers = Inputs(*[NULL] * 9), AttentionBuffers(NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)
    decode = AttentionLaunches(gpu, room, inputs, rows, 128, decode=True)
    (launch,) = (one for one in decode.step(step, buffers) if "rows" not in one.kernel)
    of_heads = launch.grid[0 if kernel.startswith("few") else 1]
    assert (launch.kernel, of_heads) == (f"attention.{kernel}", blocks_of_rows)
    prompts = [one.kernel for one in replace(decode, decode=False).step(step, buffers)]
    assert not any("few" in name for name in prompts)


def test_windows_and_chunks_have_tiles_of_their_own() -> None:
    """Windows and chunks of the same length share no tiles."""
    window, chunks = (attention(4, 1, 64, window=300, chunked=chunked) for chunked in (False, True))
    assert likeness(window) != likeness(chunks)


def test_sums_of_spans_take_bounded_memory() -> None:
    step = attention(64, 8, 128)
    room = room_of((step,), 2048, 1 << 20)
    assert 60 << 20 < room.partial_bytes(step) <= 64 << 20
    assert room.plan_bytes < 1 << 20
    assert room_of((attention(4, 1, 64),), 8, 512).slots == 8


PLANTED = ("sum = add(sum, lane < 16 ? weight : other);", "sum = add(sum, lane < 16 ? other : weight);")


def test_two_swapped_additions_are_noticed(tmp_path: Path, build_shim: Callable[..., Path]) -> None:
    """Swapped additions in decode's sum of weights change the result's bits, but hardly its values."""
    for path in (SRC / "attention").iterdir():
        shutil.copy(path, tmp_path)
    header, kernels = tmp_path / "span.cuh", tmp_path / "few.cu"
    text = header.read_text()
    assert all(text.count(line) == 1 for line in PLANTED)
    header.write_text(text.replace(PLANTED[0], "@").replace(PLANTED[1], PLANTED[0]).replace("@", PLANTED[1]))
    every = kernels.read_text()
    kernels.write_text(re.sub(r"^FEW\((?!f16, 4,).*\n", "", every, flags=re.MULTILINE))
    assert every.count("\nFEW(") == 15 and kernels.read_text().count("\nFEW(") == 1
    device = ShimDevice(build_shim({"attention.few": kernels, "attention.rows": tmp_path / "rows.cu"}))
    step = attention(4, 1, 64)
    (told,) = sequences_of(tmp_path, step, (320,), generator())
    with Bench(device) as bench:
        attender = Attender(bench, step)
        attender.fill(told, 300)
        ones = [(batch_of([([0], [at], told.table)]), told.rows[at : at + 1]) for at in range(300, 320)]
        found = np.concatenate([attender.run(batch, rows, one_row_each=True) for batch, rows in ones])
    device.close()
    assert (found.view(np.uint32) != told.wanted[300:].view(np.uint32)).any()
    np.testing.assert_allclose(found, told.wanted[300:], rtol=1e-3, atol=1e-5)
