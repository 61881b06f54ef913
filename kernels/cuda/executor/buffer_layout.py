"""Named buffers of a plan in one allocation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llamaclust.kernels.cuda.runtime.memory import aligned


@dataclass(slots=True)
class BufferLayout:
    """Before `lay_out`, `at` records the size of each buffer; afterwards it gives addresses."""

    n_bytes: int = 0
    base: int = 0
    _sizes: dict[object, int] = field(default_factory=dict)
    _offsets: dict[object, int] = field(default_factory=dict)

    def at(self, name: object, n_bytes: int) -> np.uint64:
        """The address of a buffer; 0 before `lay_out`."""
        if not self._offsets:
            self._sizes[name] = max(n_bytes, self._sizes.get(name, 0))
            return np.uint64(0)
        assert n_bytes <= self._sizes[name], (name, n_bytes, self._sizes[name])
        return np.uint64(self.base + self._offsets[name])

    def lay_out(self) -> None:
        """Assigns consecutive offsets."""
        at = 0
        for name, n_bytes in self._sizes.items():
            self._offsets[name] = at
            at = aligned(at + n_bytes)
        self.n_bytes = at

    def offset(self, name: object) -> int:
        return self._offsets[name]
