"""Checks that the shim behaves as CUDA and PTX specify, and that it detects mistakes of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.kernels.cuda.runtime.device import Device
from support.cuda.launching import Bench
from support.cuda.shim_device import KernelError, ShimDevice
from support.paths import TESTS

PROBE = TESTS / "kernels" / "cuda" / "probes" / "probe.cu"
VARIANTS = {
    "oldest cards": (("-DLLAMACLUST_ARCH=610",), ()),
    "old cards": (("-DLLAMACLUST_ARCH=750",), ()),
    "new cards": (("-DLLAMACLUST_ARCH=900",), ()),
    "other processors": (("-DLLAMACLUST_ARCH=900",), ("-DLLAMACLUST_SHIM_UCONTEXT",)),
}


@pytest.fixture(scope="module", params=VARIANTS)
def probes(request: pytest.FixtureRequest, build_shim: Callable[..., Path]) -> Iterator[Device]:
    made = ShimDevice(build_shim({"probe": PROBE}, *VARIANTS[request.param]))
    yield made
    made.close()


@pytest.fixture
def probe(probes: Device) -> Iterator[Bench]:
    with Bench(probes) as one:
        yield one


def generator() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def test_shuffles(probe: Bench) -> None:
    x = generator().integers(-1000, 1000, 128).astype(np.int32)
    out = probe.room(4 * x.nbytes)
    probe.run("probe.shuffles", 2, 64, probe.put(x), out)
    lane = np.arange(32)
    sources = (lane + 1) % 32, lane ^ 5, np.where(lane % 8 < 5, lane + 3, lane), np.where(lane < 2, lane, lane - 2)
    wanted = np.stack([x.reshape(4, 32)[:, source] for source in sources], -1)
    np.testing.assert_array_equal(probe.get(out, (4, 32, 4), np.int32), wanted)


def test_shared_memory(probe: Bench) -> None:
    x = generator().standard_normal(128, np.float32)
    out = probe.room(x.nbytes)
    probe.run("probe.shared", 1, 128, probe.put(x), out, shared_bytes=512)
    np.testing.assert_array_equal(probe.get(out, 128), x[::-1] + 2 * np.roll(x, -1))
    with pytest.raises(KernelError, match="outside of every buffer"):
        probe.run("probe.shared", 1, 128, probe.put(x), out, shared_bytes=496)


def fragments_of_a(a: np.ndarray) -> np.ndarray:
    """Returns int32 [lane][register]; registers run over rows first, then over columns."""
    rows, k = a.shape
    parts = a.reshape(rows // 8, 8, k // 16, 4, 4)  # half, row, part of k, column of lanes, byte
    return np.ascontiguousarray(parts.transpose(1, 3, 2, 0, 4)).reshape(32, -1).view(np.int32)


@pytest.mark.parametrize(("k", "is_unsigned"), [(16, False), (32, False), (32, True)])
def test_matrix_products(probe: Bench, k: int, is_unsigned: bool) -> None:
    source = generator()
    a = (
        source.integers(0, 256, (16, k)).astype(np.uint8)
        if is_unsigned
        else source.integers(-128, 128, (16, k)).astype(np.int8)
    )
    b = source.integers(-128, 128, (k, 8)).astype(np.int8)
    d = source.integers(-(1 << 20), 1 << 20, (16, 8)).astype(np.int32)
    columns = np.ascontiguousarray(b.reshape(k // 16, 4, 4, 8).transpose(3, 1, 0, 2)).reshape(32, -1).view(np.int32)
    places = np.ascontiguousarray(d.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3)).reshape(32, 4)
    out = probe.put(places)
    probe.run("probe.multiply", 1, 32, probe.put(fragments_of_a(a)), probe.put(columns), k, int(is_unsigned), out)
    found = probe.get(out, (8, 4, 2, 2), np.int32).transpose(2, 0, 1, 3).reshape(16, 8)
    np.testing.assert_array_equal(found, d + a.astype(np.int32) @ b.astype(np.int32))


def test_dot_products_of_bytes(probe: Bench) -> None:
    a, b = generator().integers(-(1 << 31), 1 << 31, (2, 1000)).astype(np.int32)
    out = probe.room(8000)
    probe.run("probe.bytes", 16, 64, probe.put(a), probe.put(b), 1000, out)
    columns = b.view(np.int8).reshape(-1, 4).astype(np.int32)
    for found, two in zip(probe.get(out, (2, 1000), np.int32), (columns[:, :2], columns[:, 2:]), strict=True):
        np.testing.assert_array_equal(found, (a.view(np.int16).reshape(-1, 2) * two).sum(1) + np.arange(1000))


def test_halves(probe: Bench) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    out = probe.room(4 << 16)
    probe.run("probe.halves", 1024, 64, probe.put(halves), out)
    found, wanted = probe.get(out, 1 << 16), halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
    assert not np.isnan(found[~np.isnan(wanted)]).any()
    bits = generator().integers(0, 1 << 32, 1 << 16, np.uint32)
    bits[:3000] = np.float32(1).view(np.uint32) + np.arange(3000) * 0x800  # ties among them
    bits[3000:6000] = np.float32(2**-16).view(np.uint32) + np.arange(3000) * 0x1000  # subnormal ones
    x = bits.view(np.float32)
    rounded = probe.room(2 << 16)
    probe.run("probe.rounded", 1024, 64, probe.put(x), rounded)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(probe.get(rounded, 1 << 16, np.float16), x.astype(np.float16))


def test_copies_in_the_background(probe: Bench) -> None:
    """Copied data is certain to be complete only after the wait for it."""
    x = generator().standard_normal(384, np.float32)
    out, there = probe.room(x.nbytes), np.roll(x.reshape(3, 128), -5, 1)
    for done in (3, 2, 0):
        probe.run("probe.copies", 1, 32, probe.put(x), done, out)
        found = probe.get(out, (3, 128))
        np.testing.assert_array_equal(found[:done], there[:done])
        assert np.isnan(found[done:]).all()


@pytest.mark.parametrize("mixed", [0, 1], ids=["bulk", "mixed"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_bulk_copies(probe: Bench, stages: int, mixed: int) -> None:
    """Parts are complete after the wait for them and not before, whatever their memory held."""
    x = generator().standard_normal(7 * 64, np.float32)
    out, there = probe.room(x.nbytes), np.roll(x.reshape(7, 64), -5, 1)
    for early in (-1, 0, 4):
        probe.run("probe.bulk_copies", 1, 32, probe.put(x), 7, early, mixed, out, shared_bytes=264 * stages)
        found = probe.get(out, (7, 64))
        late = np.arange(7) != early
        np.testing.assert_array_equal(found[late], there[late])
        assert early < 0 or (np.isnan(found[early]).any() if not mixed else (found[early] != there[early]).any())


def test_one_of_a_round_is_the_last(probe: Bench) -> None:
    out = probe.put(np.zeros(1, np.int32))
    probe.run("probe.last_ones", 1, 64, 5, out)
    assert probe.get(out, 1, np.int32)[0] == 5


@pytest.mark.parametrize("turns", [1, 3, 17])
def test_warps_take_turns_at_named_barriers(probe: Bench, turns: int) -> None:
    x, out = generator().integers(-100, 100, turns).astype(np.int32), probe.room(128)
    for _ in range(2):
        probe.run("probe.turns", 1, 96, probe.put(x), turns, out)
        wanted = 0
        for number in x.tolist():
            wanted = number - wanted
        assert set(probe.get(out, 32, np.int32).tolist()) == {wanted}


def test_atomics(probe: Bench) -> None:
    x = generator().integers(-1000, 1000, 320).astype(np.int32)
    odd, largest = probe.put(np.zeros(1, np.int32)), probe.put(np.full(1, -5000, np.int32))
    probe.run("probe.count", 10, 32, probe.put(x), odd, largest)
    assert probe.get(odd, 1, np.int32)[0] == (x % 2).sum()
    assert probe.get(largest, 1, np.int32)[0] == x.max()


MISTAKES = {
    0: r"61 at __syncthreads \(probe.cu:\d+\); 3 of 64 have ended",
    1: "__syncthreads at different places",
    2: r"32 for their warp .*; 32 of 64 have ended",
    3: "an index outside of an array",
    4: "outside of every buffer",
    5: "not aligned",
    6: "outside of every buffer",
    7: "a shuffle from lane 5, which is not there",
    8: "wrote beside a buffer",
    9: "outside of every buffer",
    10: r"thread \d+ at a barrier \(probe.cu:\d+\); 32 of 64 have ended",
    11: "a barrier of different numbers of threads",
    12: "no named barrier: 16",
    13: "no warp waits at named barrier 2, where others arrived",
    14: "or of no whole warps",
    15: "lanes of a warp at different places",
    16: "an arrival that is not initialized",
    17: "an arrival that is not aligned to 8 bytes",
    18: "a bulk copy that is not aligned to 16 bytes",
    19: "bulk copies of 32 bytes, announced as 16",
    20: "announced again before they were waited for",
    21: "a block ends while bulk copies are under way",
    22: r"thread \d+ for copies that none requests \(probe.cu:\d+\)",
    23: "more threads arrive with copies than were said",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_errors(probe: Bench, kind: int) -> None:
    """A launch with a mistake does not block, and the next launch works."""
    x = probe.put(np.zeros(68, np.float32))
    out = probe.room(256)
    with pytest.raises(KernelError, match=MISTAKES[kind]):
        probe.run("probe.mistakes", 1, 64, kind, x, out)
    if kind == 8:
        out.close()
    probe.run("probe.mistakes", 1, 64, 99, x, probe.room(256))


@pytest.mark.parametrize("in_block", [0, 1])
def test_no_order_is_kept(probe: Bench, in_block: int) -> None:
    """A kernel with a missing barrier, or with blocks that wait for each other, gives another result the next time."""
    found = []
    for _ in range(2):
        everywhere, out = probe.put(np.full(2, np.nan, np.float32)), probe.room(512)
        probe.run("probe.races", 2, 64, in_block, everywhere, out)
        found.append(np.isnan(probe.get(out, 128)))
    assert sum(found[0]) == 64
    np.testing.assert_array_equal(found[0], ~found[1])


def test_launches_that_do_not_fit(probe: Bench) -> None:
    x, out = probe.put(np.zeros(64, np.float32)), probe.room(256)
    for grid, block, args, what in (
        ((1,), (128,), (0, x, out), "made for blocks of 64 threads"),
        ((0,), (64,), (0, x, out), "a grid of"),
        ((1, 65536), (64,), (0, x, out), "a grid of"),
        ((1,), (64,), (0.0, x, out), "takes"),
        ((1,), (64,), (0, x), "takes"),
    ):
        with pytest.raises(KernelError, match=what):
            probe.run("probe.mistakes", grid, block, *args)
    with pytest.raises(KernelError, match=r"no kernel probe\.nothing; there is"):
        probe.run("probe.nothing", 1, 64)
    with pytest.raises(InsufficientMemoryError):
        probe.room(1 << 40)
    out.close()
    with pytest.raises(AssertionError, match="closed"):
        probe.run("probe.mistakes", 1, 64, 99, x, out)


def test_graphs(probe: Bench) -> None:
    """Captured work runs when the graph is launched, with the contents of pinned memory at that time."""
    device = probe.device
    pinned, back = device.pinned(512), device.pinned(1024)
    x, out = probe.room(512), probe.room(1024)

    def work() -> None:
        device.copy_in(x, 0, pinned)
        probe.run("probe.bytes", 1, 64, x, x, 32, out)
        device.copy_out(back[:256], out, 0)

    graph = device.capture(work)
    assert (back == 0xFF).all()
    for value in (1, 3):
        pinned.view(np.int32)[:] = value
        graph.launch()
        device.event().synchronize()
        np.testing.assert_array_equal(back[:128].view(np.int32), np.arange(32) + value * value)
    assert (back[256:] == 0xFF).all()
    graph.close()
