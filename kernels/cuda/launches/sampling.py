"""Launches that rank the last stage's logits for the sampler (src/sampling.cu)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import Launch

_CANDIDATES, _SUMMED_LOGITS, _END_WORDS = 1024, 4096, 2
_PIECE_LOGITS, _BLOCK_PIECES = 64, 32
_THREADS = 256


def sums_of_row(vocabulary: int) -> int:
    return -(-vocabulary // _SUMMED_LOGITS)


def record_words(vocabulary: int) -> int:
    """Returns the number of int64 words in one row's record (kernels/cpu/native/sampler/ranked.h)."""
    return _CANDIDATES + sums_of_row(vocabulary) + _END_WORDS


def piece_count(vocabulary: int) -> int:
    return -(-vocabulary // _PIECE_LOGITS)


def rank_logits(
    logits: np.uint64, vocabulary: int, pieces: np.uint64, records: np.uint64, rows: RowCount
) -> Iterator[Launch]:
    args = (logits, np.int32(vocabulary), rows.address, pieces, records)
    blocks = {"maxima": -(-piece_count(vocabulary) // _BLOCK_PIECES), "candidates": sums_of_row(vocabulary)}
    for kernel, count in blocks.items():
        yield Launch(f"sampling.{kernel}", (count, rows.bucket, 1), (_THREADS, 1, 1), args)


TOTALS = "sampling.totals"


def sum_weights(
    logits: np.uint64, vocabulary: int, records: np.uint64, divisors: np.uint64, totals: np.uint64, rows: RowCount
) -> Launch:
    """Writes the sums of `RankedLogits.totals` to `totals`, int64 [rows, parts]. `divisors` [rows] are temperatures.
    Must run after `rank_logits`."""
    args = (logits, np.int32(vocabulary), rows.address, divisors, records, totals)
    return Launch(TOTALS, (sums_of_row(vocabulary), rows.bucket, 1), (_THREADS, 1, 1), args)
