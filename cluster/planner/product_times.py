"""Times of matrix products on a CPU, by quant type. Unmeasured times are derived from the machine's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from llamaclust.core.profile import DeviceProfile, ProductTime
from llamaclust.model.costs import TypedWeights
from llamaclust.model.quant_types import QuantType

READ_SHARE: Final = 0.85
"""Fraction of the memory bandwidth that one-row matrix products reach if nothing else limits them."""


@dataclass(frozen=True, slots=True)
class TypeRates:
    """Speeds of matrix products with weights of one quant type, relative to the 8-bit peak rate. `benchmarks/run.py
    product_rates` measures them with weights in the CPU cache."""

    # Number of 8-bit multiply-accumulates that take as long as decoding one weight. Several rows share the decoding.
    decode_macs: float
    peak_share: float  # Fraction of the peak that products with many rows reach.


RATES: Final[Mapping[QuantType, TypeRates]] = {
    QuantType.F32: TypeRates(5.3, 0.24),
    QuantType.F16: TypeRates(4.0, 0.22),
    QuantType.BF16: TypeRates(4.1, 0.22),
    QuantType.Q4_0: TypeRates(1.4, 0.71),
    QuantType.Q4_1: TypeRates(1.5, 0.66),
    QuantType.Q5_0: TypeRates(2.0, 0.65),
    QuantType.Q5_1: TypeRates(2.0, 0.65),
    QuantType.Q8_0: TypeRates(1.0, 0.65),
    QuantType.Q2_K: TypeRates(1.0, 0.64),
    QuantType.Q3_K: TypeRates(1.6, 0.64),
    QuantType.Q4_K: TypeRates(1.0, 0.74),
    QuantType.Q5_K: TypeRates(2.2, 0.66),
    QuantType.Q6_K: TypeRates(2.5, 0.66),
    QuantType.IQ2_XXS: TypeRates(5.6, 0.75),
    QuantType.IQ2_XS: TypeRates(10.3, 0.66),
    QuantType.IQ3_XXS: TypeRates(7.0, 0.76),
    QuantType.IQ1_S: TypeRates(4.2, 0.69),
    QuantType.IQ4_NL: TypeRates(1.4, 0.75),
    QuantType.IQ3_S: TypeRates(1.6, 0.74),
    QuantType.IQ2_S: TypeRates(4.6, 0.70),
    QuantType.IQ4_XS: TypeRates(1.5, 0.79),
    QuantType.IQ1_M: TypeRates(5.1, 0.70),
    QuantType.TQ1_0: TypeRates(0.8, 0.84),
    QuantType.TQ2_0: TypeRates(1.1, 0.77),
    QuantType.MXFP4: TypeRates(1.9, 0.64),
}
_OTHER: Final = TypeRates(4.0, 0.12)
"""Rates for types without a kernel."""


@dataclass(frozen=True, slots=True)
class ProductTimes:
    _read_bytes_s: float
    _int8_macs_s: float
    _measured: Mapping[int, Sequence[ProductTime]]  # Measured times by ggml type number, in ascending order of rows.
    _known: dict[tuple[QuantType, float], float] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: DeviceProfile, *, concurrent: bool) -> Self:
        measured: dict[int, list[ProductTime]] = {}
        for time in profile.product_times(concurrent=concurrent):
            measured.setdefault(time.quant_type, []).append(time)
        limits = profile.limits(concurrent=concurrent)
        return cls(limits.read_bytes_s, limits.int8_macs_s, measured)

    def seconds(self, weights: Sequence[TypedWeights], rows: float) -> float:
        return sum(each.n_bytes * self.byte_s(each.quant_type, rows) for each in weights)

    def byte_s(self, quant_type: QuantType, rows: float) -> float:
        key = quant_type, rows
        if key not in self._known:
            measured = self._measured.get(int(quant_type))
            self._known[key] = _at(measured, rows) if measured else self._assumed(quant_type, rows)
        return self._known[key]

    def _assumed(self, quant_type: QuantType, rows: float) -> float:
        rates, info = RATES.get(quant_type, _OTHER), quant_type.info
        weights = info.block_size / (info.block_bytes + info.tile_extra_bytes)
        macs_s = weights * (rates.decode_macs + rows / rates.peak_share) / self._int8_macs_s
        return max(1 / (READ_SHARE * self._read_bytes_s), macs_s)


def _at(times: Sequence[ProductTime], rows: float) -> float:
    if len(times) == 1 or rows <= times[0].rows:
        return times[0].byte_s
    index = next((i for i in range(1, len(times) - 1) if rows <= times[i].rows), len(times) - 1)
    low, high = times[index - 1], times[index]
    along = (rows - low.rows) / (high.rows - low.rows)
    return max(low.byte_s + along * (high.byte_s - low.byte_s), times[0].byte_s)
