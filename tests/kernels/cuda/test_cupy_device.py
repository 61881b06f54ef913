"""Tests of the CuPy device with a fake CuPy: its calls, and the messages if something is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.disk_cache import files
from llamaclust.core.errors import DeviceLostError, InsufficientMemoryError, UsageError
from llamaclust.kernels.cuda.runtime import cupy_open
from llamaclust.kernels.cuda.runtime.cubin_cache import CubinCache, KernelFolder
from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
from llamaclust.kernels.cuda.runtime.device import Launch
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from support.cuda.fake_cupy import CUDARuntimeError, FakeCupy, FakeGraph, FakeNvrtc, FakeRuntime


@pytest.fixture(autouse=True)
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    compiler = FakeNvrtc()
    monkeypatch.setattr(cupy_open, "open_nvrtc", lambda: compiler)
    return compiler


def install(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime | None = None, version: str = "14.2.0") -> FakeCupy:
    cupy = FakeCupy(runtime, version)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    return said


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match=r"needs CuPy: pip install 'llamaclust\[cuda13\]'") as error:
        CupyDevice()
    one_line(error)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import fastrlock_that_is_not_there", "CuPy lacks the module fastrlock_that_is_not_there"),
        (
            "raise ImportError('=====\\nFailed to import CuPy\\n  ImportError: libnvrtc.so.13\\n=====')",
            "libnvrtc.so.13",
        ),
        ("__version__ = '13.6.0'", "needs CuPy 14 or later, but 13.6.0 is installed"),
    ],
)
def test_a_cupy_that_does_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "cupy.py").write_text(text)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=what) as error:
        CupyDevice()
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert "pip install" in one_line(error)


@pytest.mark.parametrize(
    ("runtime", "what"),
    [
        (FakeRuntime(status=35, driver=0), "no NVIDIA driver is installed"),
        (
            FakeRuntime(status=35, driver=12040),
            "driver is for CUDA 12.4, but CuPy is for 13.2: update the driver, or pip",
        ),
        (FakeRuntime(status=100), "no NVIDIA GPU is visible"),
        (FakeRuntime(gpus=()), "no NVIDIA GPU is visible"),
        (FakeRuntime(status=999), "device cuda: status 999"),
        (FakeRuntime(gpus=((9, 0),)), r"device cuda:1: there is no such GPU; available: cuda:0 \(Card 0\)"),
        (FakeRuntime(gpus=((9, 0), (6, 0))), "Card 1 has compute capability 6.0, but kernels need 6.1"),
        (
            FakeRuntime(gpus=((9, 0), (6, 1))),
            r"13\.0 compiles for compute capability 7\.5 and later, but the GPU has 6\.1: .*'llamaclust\[cuda12\]'",
        ),
    ],
)
def test_without_a_gpu_that_does(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, what: str) -> None:
    install(monkeypatch, runtime)
    with pytest.raises(UsageError, match=what) as error:
        CupyDevice(1)
    one_line(error)


@pytest.mark.parametrize("status", [2, 46])
def test_a_gpu_that_others_have(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Another process uses all memory of the GPU, or has exclusive use of it."""
    cupy = install(monkeypatch)

    def choose(index: int) -> None:
        raise CUDARuntimeError(status)

    monkeypatch.setattr(cupy.runtime, "setDevice", choose)
    with pytest.raises(UsageError, match=rf"device cuda:1 cannot be opened: status {status}; nvidia-smi") as error:
        CupyDevice(1)
    one_line(error)


def test_what_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch)
    device = CupyDevice(1)
    assert (device.name, device.compute_capability, device.sms) == ("Card 1", (9, 0), 100)
    assert device.uuid == 16 * "01"
    assert (device.memory_bytes, device.shared_bytes, device.free_bytes) == (1 << 30, 99 << 10, 1 << 20)
    assert cupy.runtime.chosen == 1


def test_memory_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch)
    device = CupyDevice()
    with pytest.raises(InsufficientMemoryError, match="2 MiB are needed, but 1 MiB are free; take fewer layers"):
        device.allocate(2 << 20)
    with pytest.raises(InsufficientMemoryError, match="1 MiB are needed, but 1 MiB are free"):
        device.allocate(700 << 10)  # free memory is fragmented
    cupy.runtime.free_bytes = 1 << 30
    capped = CupyDevice(memory_cap_bytes=4 << 20)
    held = capped.allocate(3 << 20)
    assert capped.free_bytes == 1 << 20
    with pytest.raises(
        InsufficientMemoryError, match="2 MiB are needed, but 1 MiB are free of the 4 MiB that may be used"
    ):
        capped.allocate(2 << 20)
    held.close()
    held.close()
    assert capped.free_bytes == 4 << 20


def test_a_driver_that_fails_when_memory_is_asked_for_is_lost_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch)
    device: Any = CupyDevice()

    def malloc(n_bytes: int) -> int:
        raise CUDARuntimeError(700)  # an earlier illegal address

    monkeypatch.setattr(cupy.runtime, "malloc", malloc)
    with pytest.raises(DeviceLostError, match=r"cuda:0 .* is lost: status 700"), GpuLock("cuda:0", device).exclusive():
        device.allocate(1 << 10)


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, status = install(monkeypatch), 2
    device: Any = CupyDevice()

    def pin(n_bytes: int) -> bytearray:
        raise CUDARuntimeError(status)

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", pin)
    with pytest.raises(InsufficientMemoryError, match="16 MiB of RAM cannot be pinned for Card 0"):
        device.pinned(16 << 20)
    status = 700
    with pytest.raises(CUDARuntimeError):
        device.pinned(16 << 20)


def test_memory_of_a_lost_gpu_is_dropped_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call to a lost GPU fails, but buffers are also freed where no code could catch an error."""
    cupy = install(monkeypatch)
    device: Any = CupyDevice()
    buffer = device.allocate(1 << 10)

    def fail(*_: int) -> None:
        raise CUDARuntimeError(719)

    for name in ("free", "setDevice"):
        monkeypatch.setattr(cupy.runtime, name, fail)
    buffer.close()
    buffer.close()
    with pytest.raises(DeviceLostError, match="status 719"), GpuLock("cuda:0", device).exclusive():
        device.synchronize()


def test_kernels_that_cannot_be_kept_are_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kernels"

    def full(descriptor: int, data: memoryview) -> None:
        os.write(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_all", full)
    compiler: Any = FakeNvrtc()
    binaries = CubinCache(folder)
    paths = [binaries.get(compiler, "rows", '#line 1 "rows.cu"\nKERNEL', architecture) for architecture in (75, 90)]
    assert [path.read_bytes() for path in paths] == [b"rows for 75", b"rows for 90"]
    binaries.close()
    assert not paths[0].parent.exists() and [path.name for path in folder.iterdir()] == ["lock"]
    (record,) = caplog.records
    what = "compiled kernels cannot be stored: No space left on device; the next start compiles them again"
    assert record.getMessage() == what


def test_copies_are_in_order_with_launches(monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    cupy = install(monkeypatch)
    device = CupyDevice(0, folder=tmp_path)
    buffer, pinned, back = device.allocate(100), device.pinned(40), device.pinned(40)
    device.upload(buffer, 0, np.arange(100, dtype=np.uint8))
    found = np.empty(10, np.uint8)
    device.copy_out(found, buffer, 90)
    device.synchronize()
    np.testing.assert_array_equal(found, np.arange(90, 100))
    pinned[:], back[:] = 7, 0
    device.copy_in(buffer, 30, pinned)
    launch = Launch("elementwise.rows.add_rows", (1, 2, 1), (256, 1, 1), (buffer.at(8), np.int32(5)))
    device.launch(launch)
    device.copy_out(back, buffer, 31)
    assert cupy.launches == [] and not back.any()
    device.event().synchronize()
    np.testing.assert_array_equal(back, [7] * 39 + [70])
    assert cupy.launches == [("add_rows", (1, 2, 1), (256, 1, 1), (np.uint64(buffer.address + 8), np.int32(5)), 0)]
    with pytest.raises(AssertionError):
        device.copy_in(buffer, 61, pinned)
    buffer.close()
    with pytest.raises(AssertionError, match="closed"):
        buffer.at()


def test_graphs(monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    cupy = install(monkeypatch)
    device = CupyDevice(0, folder=tmp_path)
    buffer, pinned, found = device.allocate(16), device.pinned(16), device.pinned(16)
    launch = Launch("elementwise.rows.add_rows", (1, 1, 1), (256, 1, 1), ())
    device.prepare(["elementwise.rows.add_rows"])

    def work() -> None:
        device.copy_in(buffer, 0, pinned)
        device.launch(launch)

    graph = device.capture(work)
    device.synchronize()
    assert cupy.launches == []
    for value in (3, 4):
        pinned[:] = value
        graph.launch()
        device.copy_out(found, buffer, 0)
        device.synchronize()
        np.testing.assert_array_equal(found, [value] * 16)
    assert len(cupy.launches) == 2
    graph.close()

    def too_large(graph: FakeGraph, stream: object) -> None:
        raise CUDARuntimeError(2)

    with monkeypatch.context() as patched, pytest.raises(InsufficientMemoryError, match="memory for a CUDA graph"):
        patched.setattr(FakeGraph, "upload", too_large)
        device.capture(work)

    def failing() -> None:
        device.launch(launch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        device.capture(failing)
    device.launch(launch)
    device.synchronize()
    assert len(cupy.launches) == 3


def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    """A machine compiles kernels once per compute capability, and needs no folder that can be written."""
    cupy = install(monkeypatch)
    kernels = ["elementwise.rows.add_rows", "elementwise.rows.slice", "elementwise.norms.rms_norm"]
    for index in (0, 0, 1):
        device = CupyDevice(index, folder=tmp_path / "kernels")
        device.prepare(kernels)
        device.close()
    assert nvrtc.compiled == [
        ("elementwise.rows", 86),
        ("elementwise.norms", 86),
        ("elementwise.rows", 90),
        ("elementwise.norms", 90),
    ]
    assert cupy.loaded == [b"elementwise.rows for 86", b"elementwise.norms for 86"] * 2 + [
        b"elementwise.rows for 90",
        b"elementwise.norms for 90",
    ]
    assert not list((tmp_path / "kernels").glob("*.tmp"))
    (tmp_path / "file").touch()
    device = CupyDevice(folder=tmp_path / "file")
    device.prepare(kernels[:1])
    assert cupy.loaded[-1] == b"elementwise.rows for 86"
    device.close()
    assert not cupy.files[-1].exists()


def kept_kernels(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".cubin"]


@pytest.mark.parametrize("data", [b"", b"half of i", b"elementwise.rows for 99"])
def test_a_damaged_kernel_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
    nvrtc: FakeNvrtc,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    data: bytes,
) -> None:
    """The damaged kernel never reaches the driver."""
    cupy = install(monkeypatch)
    CupyDevice(folder=tmp_path).prepare(["elementwise.rows.slice"])
    (kept,) = kept_kernels(tmp_path)
    kept.write_bytes(data)
    for _ in range(2):
        CupyDevice(folder=tmp_path).prepare(["elementwise.rows.slice", "elementwise.rows.add_rows"])
    assert nvrtc.compiled == [("elementwise.rows", 86)] * 2 and kept.read_bytes() == b"elementwise.rows for 86"
    assert cupy.loaded == [b"elementwise.rows for 86"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{kept}: its bytes differ from those that were compiled; it is deleted"
    ]


def test_a_kernel_that_the_driver_rejects_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc, tmp_path: Path
) -> None:
    """Another process may delete or damage the kernel before the driver reads it."""
    cupy = install(monkeypatch)
    CupyDevice(folder=tmp_path).prepare(["elementwise.rows.slice"])
    (kept,) = kept_kernels(tmp_path)
    find = KernelFolder.find

    def find_then_damage(folder: KernelFolder, key: str) -> Path | None:
        path = find(folder, key)
        kept.write_bytes(b"half of i")
        return path

    monkeypatch.setattr(KernelFolder, "find", find_then_damage)
    CupyDevice(folder=tmp_path).prepare(["elementwise.rows.slice"])
    assert nvrtc.compiled == [("elementwise.rows", 86)] * 2 and kept.read_bytes() == b"elementwise.rows for 86"
    assert cupy.loaded[-1] == b"elementwise.rows for 86"


def test_a_folder_where_others_could_plant_kernels(
    monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc, tmp_path: Path
) -> None:
    cupy, folder = install(monkeypatch), tmp_path / "kernels"
    CupyDevice(folder=folder).prepare(["elementwise.rows.slice"])
    assert folder.stat().st_mode & 0o777 == 0o700
    (kept,) = kept_kernels(folder)
    kept.write_bytes(b"planted for 86")
    folder.chmod(0o777)
    CupyDevice(folder=folder).prepare(["elementwise.rows.slice"])
    assert cupy.loaded[-1] == b"elementwise.rows for 86" and cupy.files[-1].parent != folder


def test_a_compiler_that_is_newer_than_the_driver(monkeypatch: pytest.MonkeyPatch, nvrtc: FakeNvrtc) -> None:
    install(monkeypatch, FakeRuntime(driver=12080))
    with pytest.raises(
        UsageError, match=r"driver is for CUDA 12\.8, but NVRTC is 13\.0: update the driver, or"
    ) as error:
        CupyDevice()
    one_line(error)


@pytest.mark.parametrize("static_bytes", [0, 576, 1 << 10, 17 << 10])
def test_much_shared_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, static_bytes: int) -> None:
    """A kernel's attribute requests shared memory beyond 48 KiB, which includes static memory."""
    cupy = install(monkeypatch)
    cupy.static_bytes = static_bytes
    device, plain = CupyDevice(folder=tmp_path), (48 << 10) - static_bytes
    wanted = {plain: plain, plain + 1: plain + 1, 90 << 10: 90 << 10, 64 << 10: 90 << 10}
    for shared_bytes, allowed in wanted.items():
        device.launch(Launch("elementwise.rows.slice", (1, 1, 1), (1, 1, 1), (), shared_bytes))
        assert cupy.kernels[0].max_dynamic_shared_size_bytes == allowed
    device.synchronize()
    assert [launch[-1] for launch in cupy.launches] == [*wanted]


def test_closing_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch)
    device = CupyDevice()
    for n_bytes in (0, 10, 1000):
        device.allocate(n_bytes)
    assert len(cupy.runtime.memory) == 3
    device.close()
    assert cupy.runtime.memory == {} and cupy.runtime.free_bytes == 1 << 20
