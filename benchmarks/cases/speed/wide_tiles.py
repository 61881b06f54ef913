from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
from cases.speed.kernels import MEMORY_BYTES, WORK, matrices_of
from numpy.typing import NDArray
from runner.case import Case, Group, Measures, option
from runner.options import listed, positive

from llamaclust.kernels import _native
from llamaclust.kernels.probes import ReadProbe
from llamaclust.model.quant_types import WIDER_TILES

_COLUMNS = 2048
_READ_S = 0.1


@dataclass(frozen=True)
class WideTiles(Case):
    """Compares products of weights that are packed as a wider type (`WIDER_TILES`) or as their own type.
    Figures are a product's time and its share of the read bandwidth. Both kinds of tiles give equal bits."""

    rounds = 9
    tokens: tuple[int, ...] = option((1, 8), "numbers of tokens (rows of activations)", listed(positive))
    threads: int = option(2, "number of threads that compute", positive)
    cached: bool = option(False, "use few weights, which stay in the CPU cache")

    async def groups(self) -> AsyncIterator[Group]:
        rows, least_bytes = (256, 0) if self.cached else (5632, MEMORY_BYTES)
        for quant_type, wider in WIDER_TILES.items():
            own, wide = (matrices_of(tile, rows, _COLUMNS, quant_type, least_bytes) for tile in (quant_type, wider))
            for tokens in self.tokens:
                x = np.random.default_rng(1).standard_normal((tokens, _COLUMNS)).astype(np.float32)
                name = f"{quant_type.name}, {tokens} tokens, {wide[0].bytes / own[0].bytes:.2f} of the bytes"
                yield Group(
                    name, {"own tiles": partial(self._measure, own, x), "wider": partial(self._measure, wide, x)}
                )

    async def _measure(self, matrices: list[_native.PackedMatrix], x: NDArray[np.float32], turn: int) -> Measures:
        level, ways = _native.available_levels()[-1], (False, True) if len(x) == 1 else (False,)
        bits = _native.matmul(level, matrices[0], x, self.threads).tobytes()
        used = list(islice(cycle(matrices), max(1, int(WORK // (len(bits) // 4 * _COLUMNS)))))
        seconds = min(_native.matmul_seconds(level, used, x, self.threads, near) for near in ways) / len(used)
        read_gb_s = ReadProbe(self.threads).measure(_READ_S)
        return {"us": 1e6 * seconds, "of read": matrices[0].bytes / seconds / 1e9 / read_gb_s, "bits": bits}
