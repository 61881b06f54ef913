"""Writes the record of a run on a GPU: hardware, software, method, and all figures."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpu_support.sources import ROOT, sources_digest
from gpu_support.stage import Loaded, report
from llamaclust.core.errors import UsageError
from llamaclust.kernels.cuda.runtime.cupy_open import import_cupy
from llamaclust.kernels.cuda.runtime.nvrtc import open_nvrtc
from llamaclust.model.gguf.atomic_file import new_file
from llamaclust.tools.model_info import describe
from llamaclust.worker.devices.system_info import processor_name, total_memory_bytes

_QUERY_S = 30.0


def described(loaded: Loaded, command: Sequence[str]) -> dict[str, Any]:
    """Returns the record without its figures. Unknown values are None. `kernels` has the rates of single products on
    the GPU, with one row and with many, as workers measure them."""
    reached = loaded.kernels()
    task, layout, gpu = loaded.task, loaded.layout, loaded.gpu.gpu()
    quant_type = max(describe(loaded.model.file).by_type, key=lambda share: share.bytes).name
    level = loaded.gpu.feature_level.removeprefix("sm_")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "llamaclust": {"version": version("llamaclust"), "commit": _commit(), "sources": sources_digest(ROOT)},
        "gpu": {
            "name": gpu.name,
            "memory_bytes": gpu.total_bytes,
            "compute_capability": f"{level[:-1]}.{level[-1]}",
            **software(),
        },
        "processor": {"name": processor_name(), "threads": task.threads, "memory_bytes": total_memory_bytes()},
        "model": {
            "name": task.model.stem,
            "file_bytes": task.model.stat().st_size,
            "quant_type": quant_type,
            "layers": layout.gpu.end,
        },
        "settings": {
            "prompt": task.prompt,
            "generate": task.generate,
            "sequences": task.sequences,
            "graphs": task.graphs,
            "gpu_memory_bytes": task.gpu_memory_bytes,
            "cpu_moe": task.cpu_moe,
            "experts_cache_bytes": task.experts_cache_bytes,
        },
        "placement": {
            "gpu_layers": layout.gpu.end - layout.gpu.start,
            "cpu_moe": layout.gpu.cpu_moe,
            "vram_bytes": layout.vram_bytes,
            "ram_bytes": layout.ram_bytes,
            "experts_cache_bytes": layout.gpu.experts_cache_bytes,
            "load_s": loaded.load_s,
        },
        "kernels": {"read_gb_s": reached.read_bytes_s / 1e9, "int8_gmac_s": reached.int8_macs_s / 1e9},
    }


def record_name(record: dict[str, Any]) -> str:
    """Returns the name of the record's file, with the GPU, the model and the memory settings."""
    placement, cap = record["placement"], record["settings"]["gpu_memory_bytes"]
    layers, copies = len(placement["cpu_moe"]), placement["experts_cache_bytes"]
    parts = [record["gpu"]["name"], record["model"]["name"], *([f"{cap >> 20}mib"] if cap else [])]
    parts += [*([f"{layers}-cpu-moe"] if layers else []), *([f"{copies >> 20}mib-copies"] if copies else [])]
    return "-".join(re.sub(r"[^a-z0-9._]+", "-", part.lower()).strip("-") for part in parts) + ".json"


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Writes the file, which appears only when it is complete. Raises OSError or UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    path, data = folder / record_name(record), json.dumps(record, indent=2, allow_nan=False).encode() + b"\n"
    with new_file(path, len(data)) as file:
        file.write(data)
    return path


@dataclass
class RecordFile:
    folder: Path
    error: OSError | UsageError | None = None

    def write(self, record: dict[str, Any]) -> None:
        try:
            path, self.error = write_record(self.folder, record), None
        except (OSError, UsageError) as error:
            self.error = error
            report(f"the record was not written: {error}")
        else:
            report(f"the record was written: {path}")


def software() -> dict[str, str | None]:
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found: dict[str, str | None] = {"driver": driver, "cuda": None, "cupy": None, "nvrtc": None}
    try:
        cupy = import_cupy()
        number = cupy.cuda.runtime.driverGetVersion()
        found |= {"cuda": f"{number // 1000}.{number % 1000 // 10}", "cupy": cupy.__version__}
        found["nvrtc"] = ".".join(map(str, open_nvrtc().version))
    except UsageError:  # CuPy or NVRTC is missing.
        pass
    return found | {"python": platform.python_version()}


def _commit() -> str | None:
    here = str(Path(__file__).parent)
    return _first_line("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    return lines[0].strip() or None if lines else None
