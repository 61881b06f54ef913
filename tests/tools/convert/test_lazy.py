"""Checks the cache of converted results."""

from __future__ import annotations

from threading import Thread

import numpy as np

from llamaclust.tools.convert.lazy import Recent, constant, transposed


def test_results_that_need_other_results_do_not_block() -> None:
    recent = Recent()
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    matrix = transposed(constant(values, "m"), recent)
    found: list[np.ndarray] = []
    thread = Thread(target=lambda: found.append(recent.get(found, matrix.all)), daemon=True)
    thread.start()
    thread.join(60)
    np.testing.assert_array_equal(found[0], values.T)
