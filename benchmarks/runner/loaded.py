"""A program that loads a model, computes a prompt and some tokens, and prints its times and memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter, time

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner

_MOST_BYTES = 1 << 40
_ROWS = 512
_MIB = 1 << 20


def load(path: Path, threads: int, folder: Path | None, started_s: float) -> dict[str, float]:
    begun = perf_counter()
    model = Model.open(path)
    backend = CpuBackend(threads, packed_cache=None if folder is None else PackedCacheFolder(folder, _MOST_BYTES))
    blocks = _ROWS // 16 + 4
    limits = StageLimits(_ROWS, 1, 1, blocks * 16, blocks)
    runner = StageRunner(backend, model, 0, model.layer_count, limits, StageOptions(threads=threads))
    ready_s, process_s = perf_counter() - begun, time() - started_s

    def run(position: int, tokens: int) -> float:
        begun = perf_counter()
        chunk = Chunk((1,) * tokens, position, (0, blocks), 1)
        runner.run(Microbatch(model.model_id, 1, 0, (chunk,)), None)
        return perf_counter() - begun

    begun = perf_counter()
    if backend.packed_cache is not None:
        backend.packed_cache.wait()
    written_s = perf_counter() - begun
    run(0, _ROWS)
    decode_s = sorted(run(_ROWS + step, 1) for step in range(16))[8]
    weights, kv = runner.memory.weight_bytes / _MIB, runner.memory.kv_bytes / _MIB
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    sizes = {"weights MiB": weights, "KV MiB": kv, "peak MiB": int(line.split()[1]) / 1024}
    times = {"ready s": ready_s, "process s": process_s, "written s": written_s, "decode ms": 1e3 * decode_s}
    return {**times, **sizes, "limit MiB": 1.1 * weights + kv + 150}


if __name__ == "__main__":
    model, threads, folder, started = sys.argv[1:]
    print(json.dumps(load(Path(model), int(threads), Path(folder) if folder else None, float(started))))
