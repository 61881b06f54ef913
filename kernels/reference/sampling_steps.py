"""What the reference's samplers are made of: random bits, order, weights, penalties."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.sampling import SampleTask, SamplingParams
from llamaclust.kernels.reference.exact import exp32

Float32 = NDArray[np.float32]

UNIT_WEIGHT = 1 << 40
_MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit numbers that depend on counter and key alone."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((b >> 32) ^ c[1] ^ k[0], b & _MASK, (a >> 32) ^ c[3] ^ k[1], a & _MASK)
        k = ((k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK)
    return c


def random_bits(task: SampleTask, purpose: int = 0) -> int:
    """64 bits of the token to be chosen: 0 chooses it, 1 is for XTC."""
    low, high, _, _ = philox((task.position, task.choice, purpose, 0), (task.seed & _MASK, task.seed >> 32))
    return high << 32 | low


def scaled(bits: int, bound: int) -> int:
    """The high half of the product: uniform over [0, bound) for uniform bits."""
    return (bits * bound) >> 64


def ranked(logits: Float32) -> NDArray[np.int64]:
    """Ids ordered by (value descending, id ascending), without those at -infinity."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    return order[np.isfinite(logits[order])]


def weights(logits: Float32, maximum: np.float32, temperature: float) -> list[int]:
    """exp((x - maximum) / temperature) as integers in units of 2^-40, so that sums are exact."""
    with np.errstate(over="ignore"):
        exact = exp32(np.asarray((logits - maximum) / np.float32(temperature), np.float32))
    return [int(w) for w in np.rint(exact.astype(np.float64) * UNIT_WEIGHT)]


def penalize(
    logits: Float32, history: tuple[int, ...], params: SamplingParams, unpenalized: tuple[int, ...] = ()
) -> None:
    """Repetition, frequency and presence penalties, each step in float32."""
    for token in set(history).difference(unpenalized):
        logits[token] = _penalized(logits[token], history.count(token), params)


def _penalized(logit: np.float32, count: int, params: SamplingParams) -> np.float32:
    factor = np.float32(params.repetition_penalty)
    logit = logit * factor if logit <= 0 else logit / factor
    penalty = np.float32(count) * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    return np.float32(logit - penalty)
