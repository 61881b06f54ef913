"""GPUs by name: memory, bandwidth and 8-bit operations per second from data sheets, and compute capability."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

_GIB: Final = 1 << 30
_MATRIX_UNITS: Final = 75
"""The lowest compute capability (7.5) with 8-bit tensor cores. Older GPUs multiply four bytes at a time (dp4a)."""
_MAKERS: Final = re.compile(r"^(?:nvidia|geforce|tesla|quadro)+|gpu$")


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU product. `tops` is 10^12 dense 8-bit operations per second. A multiply-accumulate counts as two."""

    memory_gib: float  # Memory for programs. Error correction takes the rest, if it is on by default.
    bandwidth_gb_s: float
    tops: float
    compute_capability: int  # 75 stands for 7.5.

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * _GIB)

    @property
    def has_matrix_units(self) -> bool:
        return self.compute_capability >= _MATRIX_UNITS


GPU_MODELS: Final[Mapping[str, GpuModel]] = MappingProxyType(
    {
        "gtx1060": GpuModel(6, 192, 17, 61),
        "gtx1070": GpuModel(8, 256, 26, 61),
        "gtx1070ti": GpuModel(8, 256, 33, 61),
        "gtx1080": GpuModel(8, 320, 35, 61),
        "gtx1080ti": GpuModel(11, 484, 45, 61),
        "titanxp": GpuModel(12, 548, 49, 61),
        "p4": GpuModel(7.5, 192, 22, 61),
        "p40": GpuModel(22.4, 346, 47, 61),
        "titanv": GpuModel(12, 653, 60, 70),
        "v100": GpuModel(16, 900, 63, 70),
        "v100-32gb": GpuModel(32, 900, 63, 70),
        "rtx2060": GpuModel(6, 336, 103, 75),
        "rtx2060super": GpuModel(8, 448, 115, 75),
        "rtx2070": GpuModel(8, 448, 119, 75),
        "rtx2070super": GpuModel(8, 448, 145, 75),
        "rtx2080": GpuModel(8, 448, 161, 75),
        "rtx2080super": GpuModel(8, 496, 178, 75),
        "rtx2080ti": GpuModel(11, 616, 215, 75),
        "titanrtx": GpuModel(24, 672, 261, 75),
        "t4": GpuModel(15, 320, 130, 75),
        "rtx3050": GpuModel(8, 224, 73, 86),
        "rtx3060": GpuModel(12, 360, 102, 86),
        "rtx3060ti": GpuModel(8, 448, 130, 86),
        "rtx3070": GpuModel(8, 448, 163, 86),
        "rtx3070ti": GpuModel(8, 608, 174, 86),
        "rtx3080": GpuModel(10, 760, 238, 86),
        "rtx3080-12gb": GpuModel(12, 912, 245, 86),
        "rtx3080ti": GpuModel(12, 912, 273, 86),
        "rtx3090": GpuModel(24, 936, 284, 86),
        "rtx3090ti": GpuModel(24, 1008, 320, 86),
        "a2": GpuModel(15, 200, 36, 86),
        "a10": GpuModel(22.5, 600, 250, 86),
        "a30": GpuModel(24, 933, 330, 80),
        "a40": GpuModel(45, 696, 299, 86),
        "a100": GpuModel(40, 1555, 624, 80),
        "a100-80gb": GpuModel(80, 1935, 624, 80),
        "rtxa4000": GpuModel(16, 448, 153, 86),
        "rtxa5000": GpuModel(24, 768, 222, 86),
        "rtxa6000": GpuModel(48, 768, 310, 86),
        "rtx4060": GpuModel(8, 272, 121, 89),
        "rtx4060ti": GpuModel(8, 288, 177, 89),
        "rtx4060ti-16gb": GpuModel(16, 288, 177, 89),
        "rtx4070": GpuModel(12, 504, 233, 89),
        "rtx4070super": GpuModel(12, 504, 284, 89),
        "rtx4070ti": GpuModel(12, 504, 321, 89),
        "rtx4070tisuper": GpuModel(16, 672, 353, 89),
        "rtx4080": GpuModel(16, 717, 390, 89),
        "rtx4080super": GpuModel(16, 736, 418, 89),
        "rtx4090": GpuModel(24, 1008, 661, 89),
        "rtx6000ada": GpuModel(48, 960, 729, 89),
        "l4": GpuModel(22.5, 300, 242, 89),
        "l40s": GpuModel(45, 864, 733, 89),
        "h100-pcie": GpuModel(80, 2039, 1513, 90),
        "h100": GpuModel(80, 3350, 1979, 90),
        "h200": GpuModel(140, 4800, 1979, 90),
        "rtx5060": GpuModel(8, 448, 153, 120),
        "rtx5060ti": GpuModel(8, 448, 190, 120),
        "rtx5060ti-16gb": GpuModel(16, 448, 190, 120),
        "rtx5070": GpuModel(12, 672, 247, 120),
        "rtx5070ti": GpuModel(16, 896, 351, 120),
        "rtx5080": GpuModel(16, 960, 450, 120),
        "rtx5090": GpuModel(32, 1792, 838, 120),
    }
)

_NAMES: Final = {name.replace("-", ""): name for name in GPU_MODELS}


def find_gpu(text: str) -> str | None:
    """Returns the key in GPU_MODELS for any spelling, such as rtx3090 for "GeForce RTX 3090", or None if unknown."""
    return _NAMES.get(_plain(text))


def similar_gpus(text: str) -> list[str]:
    return [_NAMES[name] for name in get_close_matches(_plain(text), _NAMES, 3, 0.5)]


def _plain(text: str) -> str:
    return _MAKERS.sub("", re.sub(r"[\s_-]", "", text.lower()))
