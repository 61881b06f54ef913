"""The steps of a sampler chain in NumPy and Python, slow and obvious: what kernels/cpu/native/sampler/chain.cpp gives,
bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.sampler_chain import SamplerChain, SamplerName
from llamaclust.core.sampling import SampleTask
from llamaclust.kernels.reference.exact import LN2, exp64, log64
from llamaclust.kernels.reference.repetitions import penalize_repetitions
from llamaclust.kernels.reference.sampling_steps import UNIT_WEIGHT, penalize, random_bits, ranked, scaled, weights

Float32 = NDArray[np.float32]

_LARGEST = np.finfo(np.float32).max
_FAR_BELOW = 1e6
_MIROSTAT_TOKENS = 100


@dataclass(slots=True)
class ChainRun:
    """One row's candidates: `order` are their ids, best first; values[order] count as divided by `divisor`."""

    values: Float32  # [vocabulary]; -inf for what may not be chosen
    task: SampleTask
    chain: SamplerChain
    order: NDArray[np.int64] = field(init=False)
    divisor: float = 1.0
    w: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = ranked(self.values)

    def choose(self) -> tuple[int, float | None]:
        """The token, and Mirostat's mu for the next one."""
        for step in self.chain.order:
            _STEPS[step](self)
        if self.chain.mirostat == 0:
            return int(self.order[self._draw()]), None
        self._weigh()
        if self.chain.mirostat == 1:
            self._keep(self._mirostat_candidates())
        else:
            surprising = (i for i, one in enumerate(self._information()) if i > 0 and one / LN2 > self.task.mu)
            self._keep(next(surprising, len(self.order)))
        chosen = self._draw()
        surprise = -log64(float(self.w[chosen]) / float(sum(self.w))) / LN2
        mu = self.task.mu - self.chain.mirostat_eta * (surprise - self.chain.mirostat_tau)
        return int(self.order[chosen]), mu

    # -- steps -----------------------------------------------------------------------------------------------------

    def penalties(self) -> None:
        if self.task.params.needs_history and self.task.history:
            window = len(self.task.history) if self.task.penalty_window is None else self.task.penalty_window
            history = self.task.history[len(self.task.history) - min(window, len(self.task.history)) :]
            self._change(lambda x: penalize(x, history, self.task.params, self.chain.unpenalized))

    def dry(self) -> None:
        if self.chain.dry_multiplier > 0:
            self._change(lambda x: penalize_repetitions(x, self.task, self.chain))

    def top_n_sigma(self) -> None:
        if self.chain.top_n_sigma <= 0:
            return
        self._change(lambda x: None)
        x = self.values.astype(np.float64)
        greatest = float(x.max())
        counted = [float(v) for v in x if v >= greatest - _FAR_BELOW]
        mean = list(accumulate(counted))[-1] / len(counted)
        squares = list(accumulate((v - mean) * (v - mean) for v in counted))[-1]
        limit = greatest - self.chain.top_n_sigma * math.sqrt(squares / len(counted))
        self.values[x < limit] = -np.inf
        self.order = ranked(self.values)

    def top_k(self) -> None:
        if self.task.params.top_k > 0:
            self._keep(self.task.params.top_k)

    def tail_free(self) -> None:
        if self.chain.tfs_z >= 1 or len(self.order) <= 2:
            return
        w = self._weigh()
        bends = [abs(a - 2 * b + c) for a, b, c in zip(w, w[1:], w[2:], strict=False)]
        bends = bends if any(bends) else [1] * len(bends)
        enough = self.chain.tfs_z * float(sum(bends))
        sums = enumerate(accumulate(bends))
        self._keep(next((rank for rank, s in sums if rank > 0 and float(s) > enough), len(w)))

    def typical(self) -> None:
        if self.chain.typical_p >= 1:
            return
        w, mean, information = self._weigh(), self._entropy(), self._information()
        by_distance = sorted(range(len(w)), key=lambda rank: (abs(information[rank] - mean), rank))
        sums = accumulate(w[rank] for rank in by_distance)
        enough = self.chain.typical_p * float(sum(w))
        count = next((n for n, so_far in enumerate(sums, 1) if float(so_far) >= enough), len(w))
        self.order = self.order[sorted(by_distance[:count])]

    def top_p(self) -> None:
        if self.task.params.top_p < 1:
            w = self._weigh()
            enough = self.task.params.top_p * float(sum(w))
            self._keep(next((n for n, s in enumerate(accumulate(w), 1) if float(s) >= enough), len(w)))

    def min_p(self) -> None:
        if self.task.params.min_p > 0:
            least = self.task.params.min_p * UNIT_WEIGHT
            w = self._weigh()
            self._keep(next((rank for rank, one in enumerate(w) if rank > 0 and one < least), len(w)))

    def xtc(self) -> None:
        chain = self.chain
        if chain.xtc_probability <= 0 or chain.xtc_threshold > 0.5:
            return
        if (random_bits(self.task, 1) >> 11) * 2.0**-53 >= chain.xtc_probability:
            return
        w = self._weigh()
        least = chain.xtc_threshold * float(sum(w))
        probable = next((rank for rank, one in enumerate(w) if one < least), len(w))
        self.order = self.order[max(0, probable - 1) :]

    def temperature(self) -> None:
        wanted = float(np.float32(self.task.params.temperature))
        if self.chain.dynatemp_range > 0 and len(self.order) > 1:
            wanted = self._dynamic_temperature(wanted)
        self.divisor = float(min(np.float32(wanted), _LARGEST))
        if self.divisor == 0:
            self.divisor = 1.0
            self._keep(1)

    # -- what they need --------------------------------------------------------------------------------------------

    def _keep(self, count: int) -> None:
        self.order = self.order[:count]

    def _change(self, change: Callable[[Float32], None]) -> None:
        """Changes logits: candidates are ordered anew, and a temperature that came before is in their values."""
        x = np.full_like(self.values, -np.inf)
        with np.errstate(over="ignore"):
            x[self.order] = np.clip(self.values[self.order] / np.float32(self.divisor), -_LARGEST, _LARGEST)
        change(x)
        self.values, self.divisor, self.order = x, 1.0, ranked(x)

    def _weigh(self) -> list[int]:
        self.w = weights(self.values[self.order], self.values[self.order[0]], self.divisor)
        return self.w

    def _information(self) -> list[float]:
        """-ln of each probability; after `_weigh`."""
        log_total = log64(float(sum(self.w)) / UNIT_WEIGHT)
        with np.errstate(over="ignore"):
            x = (self.values[self.order] - self.values[self.order[0]]) / np.float32(self.divisor)
        return [log_total - float(one) for one in x]

    def _entropy(self) -> float:
        total = 0.0
        for weight, one in zip(self.w, self._information(), strict=True):
            if weight > 0:
                total += float(weight) * one
        return total / float(sum(self.w))

    def _dynamic_temperature(self, temperature: float) -> float:
        self._weigh()
        share = min(1.0, max(0.0, self._entropy() / log64(float(len(self.order)))))
        exponent = self.chain.dynatemp_exponent
        low = max(0.0, temperature - self.chain.dynatemp_range)
        high = temperature + self.chain.dynatemp_range
        if share == 0:
            return low + (high - low) * (1.0 if exponent == 0 else 0.0)
        return low + (high - low) * exp64(exponent * log64(share))

    def _mirostat_candidates(self) -> int:
        size = len(self.order)
        if size < 2:
            return 1
        x = self.values[self.order].astype(np.float64)
        products = squares = 0.0
        for i in range(min(size, _MIROSTAT_TOKENS) - 1):
            t = log64((i + 2.0) / (i + 1.0))
            products += t * (float(x[i] - x[i + 1]) / self.divisor)
            squares += t * t
        exponent = products / squares
        if not exponent > 0:
            return size
        excess, log_n = exponent - 1, log64(float(len(self.values)))
        shape = 1 / log_n if abs(excess) < 1e-9 else excess / (1 - exp64(-excess * log_n))
        count = exp64((log64(shape) + self.task.mu * LN2) / exponent)
        return size if count >= size else max(1, int(count))

    def _draw(self) -> int:
        target = scaled(random_bits(self.task), sum(self._weigh()))
        return next(rank for rank, so_far in enumerate(accumulate(self.w)) if so_far > target)


_STEPS: dict[SamplerName, Callable[[ChainRun], None]] = {
    SamplerName.PENALTIES: ChainRun.penalties,
    SamplerName.DRY: ChainRun.dry,
    SamplerName.TOP_N_SIGMA: ChainRun.top_n_sigma,
    SamplerName.TOP_K: ChainRun.top_k,
    SamplerName.TFS_Z: ChainRun.tail_free,
    SamplerName.TYPICAL_P: ChainRun.typical,
    SamplerName.TOP_P: ChainRun.top_p,
    SamplerName.MIN_P: ChainRun.min_p,
    SamplerName.XTC: ChainRun.xtc,
    SamplerName.TEMPERATURE: ChainRun.temperature,
}
