"""Time until a model is ready and peak memory, from its file and from packed layers, beside the machine's limits.

    python benchmarks/shape.py 1.1b Q4_K /tmp/shape.gguf
    python benchmarks/load.py /tmp/shape.gguf

Each load runs in a process of its own, with the files in the page cache. "ready" is from opening the file to a stage
that could run, "process" from the start of Python. The peak is of resident memory, after a prefill; its limit 1.10 of
the weights held, plus KV memory, plus 150 MiB. "copied" has the packed layers in small pages of the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, time

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.sizes import MIB

_MOST_BYTES = 1 << 40
_ROWS = 512
_OWN_BYTES = 150 * MIB
_DEADLINE_S = 600


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one process measured of itself."""

    ready_s: float
    process_s: float
    decode_ms: float
    weight_bytes: int
    kv_bytes: int
    peak_bytes: int
    written_s: float

    @property
    def limit_bytes(self) -> int:
        return round(1.1 * self.weight_bytes) + self.kv_bytes + _OWN_BYTES


def load_here(model: Path, folder: Path | None, threads: int, started_s: float) -> Loaded:
    """Loads, prefills and decodes once in this process."""
    from llamaclust.core.limits import StageLimits
    from llamaclust.kernels.cpu.backend import CpuBackend
    from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
    from llamaclust.model.loader import Model
    from llamaclust.wire.microbatch.messages import Chunk, Microbatch
    from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner

    begun = perf_counter()
    opened = Model.open(model)
    kept = None if folder is None else PackedCacheFolder(folder, _MOST_BYTES)
    backend = CpuBackend(threads, packed_cache=kept)
    blocks = _ROWS // 16 + 4
    limits = StageLimits(_ROWS, 1, 1, blocks * 16, blocks)
    runner = StageRunner(backend, opened, 0, opened.layer_count, limits, StageOptions(threads=threads))
    ready_s, process_s = perf_counter() - begun, time() - started_s

    def run(position: int, tokens: int) -> float:
        begun = perf_counter()
        chunk = Chunk((1,) * tokens, position, (0, blocks), 1)
        runner.run(Microbatch(opened.model_id, 1, 0, (chunk,)), None)
        return perf_counter() - begun

    written_s = 0.0
    if backend.packed_cache is not None:
        begun = perf_counter()
        backend.packed_cache.wait()
        written_s = perf_counter() - begun
    run(0, _ROWS)
    decode_s = sorted(run(_ROWS + step, 1) for step in range(16))[8]
    memory = runner.memory
    return Loaded(ready_s, process_s, decode_s * 1e3, memory.weight_bytes, memory.kv_bytes, _peak_bytes(), written_s)


def _peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def load_elsewhere(model: Path, folder: Path | None, threads: int) -> Loaded:
    """The same in a process of its own."""
    words = [sys.executable, __file__, str(model), "--threads", str(threads), "--child", repr(time())]
    words += ["--folder", str(folder)] if folder else []
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        raise LlamaclustError(f"{model}: a load took more than {_DEADLINE_S} s") from None
    if said.returncode != 0:
        raise LlamaclustError(said.stderr.strip().splitlines()[-1])
    return Loaded(*json.loads(said.stdout))


def into_small_pages(folder: Path) -> None:
    """Has the page cache drop the images and read them again as plain reading does."""
    for path in folder.glob("*.tiles"):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 16):
                pass


def measured(model: Path, threads: int, repeats: int) -> Iterator[tuple[str, Loaded]]:
    with model.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    with TemporaryDirectory(prefix="llamaclust-load-", dir=model.parent) as name:
        folder = Path(name) / "packed"
        yield "and packing", load_elsewhere(model, folder, threads)
        for _ in range(repeats):
            yield "from the file", load_elsewhere(model, None, threads)
            yield "packed", load_elsewhere(model, folder, threads)
        into_small_pages(folder)
        for _ in range(repeats):
            yield "packed, copied", load_elsewhere(model, folder, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        found = load_here(options.model, options.folder, options.threads, options.child)
        print(json.dumps([getattr(found, name) for name in Loaded.__slots__]))
        return
    if not options.model.is_file():
        raise UsageError(f"{options.model}: no such file; make one with benchmarks/shape.py")
    print(f"{'':18}{'ready':>9}{'process':>9}{'decode':>10}{'weights':>10}{'KV':>6}{'peak':>8}{'limit':>8} MiB")
    ready_s: dict[str, list[float]] = {}
    for how, sample in measured(options.model, options.threads, options.repeats):
        ready_s.setdefault(how, []).append(sample.ready_s)
        sizes = (sample.weight_bytes, sample.kv_bytes, sample.peak_bytes, sample.limit_bytes)
        weights, kv, peak, limit = (round(size / MIB) for size in sizes)
        note = f"   written {sample.written_s:.2f} s later" if sample.written_s > 0.01 else ""
        over = "" if sample.peak_bytes <= sample.limit_bytes else "   OVER THE LIMIT"
        print(
            f"{how:18}{sample.ready_s:7.3f} s{sample.process_s:7.3f} s{sample.decode_ms:7.2f} ms"
            f"{weights:10}{kv:6}{peak:8}{limit:8}{note}{over}",
            flush=True,
        )
    medians = ", ".join(f"{how} {median(values):.3f} s" for how, values in ready_s.items())
    print(f"ready, medians: {medians}\nlimits for 1.1B Q4_K on two cores: from the file 2 s, packed 0.5 s")


if __name__ == "__main__":
    try:
        main()
    except LlamaclustError as error:
        sys.exit(f"error: {error}")
