"""One row through the sampler."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.sampling import Sampler
from llamaclust.wire.messages import RowResult, RowTask


def sampled(sampler: Sampler, logits_row: NDArray[np.float32], task: RowTask) -> RowResult:
    """What becomes of one row [vocabulary]."""
    return sampler.run(logits_row[np.newaxis], (task,))[0]
