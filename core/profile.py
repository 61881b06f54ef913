"""Measured speeds of a worker's processor and GPUs, in bytes, seconds and multiply-accumulates (MACs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from statistics import fmean
from typing import Annotated

from llamaclust.core.bounds import MAX_GPUS, Integer, Rate, Real, Size
from llamaclust.core.errors import ProtocolError

_Seconds = Annotated[float, Real(0.0, 3600.0)]


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of a step with `rows` rows: stage_s + layers_byte_s * bytes, plus head_s on the last stage. `bytes`
    counts the weights, KV memory and recurrent state that the step reads."""

    rows: Annotated[int, Integer(1, 1 << 16)]
    stage_s: _Seconds
    layers_byte_s: _Seconds
    head_s: _Seconds

    def interpolate(self, other: StepTime, rows: int) -> StepTime:
        share = (rows - self.rows) / (other.rows - self.rows)
        values = (max(0.0, a + share * (b - a)) for a, b in zip(_values(self), _values(other), strict=True))
        return StepTime(rows, *values)


StepTimes = Annotated[tuple[StepTime, ...], Size(0, 16)]


def at_rows(times: StepTimes, rows: int) -> StepTime:
    """Returns the step time for `rows` rows, interpolated or extrapolated from `times`, which must not be empty."""
    if len(times) == 1:
        return times[0]
    index = next((i for i in range(1, len(times) - 1) if rows <= times[i].rows), len(times) - 1)
    return times[index - 1].interpolate(times[index], rows)


@dataclass(frozen=True, slots=True)
class ProductTime:
    """The time of a matrix product with weights of one quant type, per byte of these weights in memory."""

    quant_type: Annotated[int, Integer(0, 255)]  # Number of the quant type in ggml.
    rows: Annotated[int, Integer(1, 1 << 16)]
    byte_s: Annotated[float, Real(0.0, 1.0)]


ProductTimes = Annotated[tuple[ProductTime, ...], Size(0, 1 << 10)]


@dataclass(frozen=True, slots=True)
class Limits:
    read_bytes_s: Rate  # Bytes of weights read per second.
    int8_macs_s: Rate


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device's speed, measured while other workers were busy. For the `isolated` fields, they were idle."""

    read_bytes_s: Rate  # Bytes of weights read per second.
    int8_macs_s: Rate
    concurrent: StepTimes = ()
    isolated: StepTimes = ()
    products: ProductTimes = ()
    isolated_products: ProductTimes = ()
    isolated_limits: Limits | None = None  # Empty `isolated` fields mean the same speed as on a busy machine.

    def check(self) -> None:
        for times in (self.concurrent, self.isolated):
            if any(time.rows >= later.rows for time, later in pairwise(times)):
                raise ProtocolError("step times must be in ascending order of rows")
        for products in (self.products, self.isolated_products):
            if any(_place(time) >= _place(later) for time, later in pairwise(products)):
                raise ProtocolError("matrix product times must be in ascending order of quant type and rows")

    def limits(self, *, concurrent: bool) -> Limits:
        measured = Limits(self.read_bytes_s, self.int8_macs_s)
        return measured if concurrent else self.isolated_limits or measured

    def beside(self, isolated: DeviceProfile) -> DeviceProfile:
        return replace(
            self,
            isolated=isolated.concurrent,
            isolated_products=isolated.products,
            isolated_limits=Limits(isolated.read_bytes_s, isolated.int8_macs_s),
        )

    def step_times(self, *, concurrent: bool) -> StepTimes:
        """Returns step times on a busy (`concurrent`) or idle machine, or () if `product_times` predict them better."""
        if concurrent or self.isolated:
            return self.concurrent if concurrent else self.isolated
        return () if self.isolated_products else self.concurrent

    def product_times(self, *, concurrent: bool) -> ProductTimes:
        return self.products if concurrent else self.isolated_products or self.products

    def without_steps(self) -> DeviceProfile:
        return replace(self, concurrent=(), isolated=())

    def with_other_products(self, known: DeviceProfile) -> DeviceProfile:
        return replace(
            self,
            products=_joined(self.products, known.products),
            isolated_products=_joined(self.isolated_products, known.isolated_products),
        )


@dataclass(frozen=True, slots=True)
class Profile:
    cpu: DeviceProfile
    # GPUs in the order of the worker's registration.
    gpus: Annotated[tuple[DeviceProfile, ...], Size(0, MAX_GPUS)] = ()

    def with_other_products(self, known: Profile) -> Profile:
        return replace(self, cpu=self.cpu.with_other_products(known.cpu))

    def map(self, change: Callable[[DeviceProfile], DeviceProfile]) -> Profile:
        return Profile(change(self.cpu), tuple(map(change, self.gpus)))


def mean_profile(profiles: Sequence[Profile]) -> Profile:
    # Workers choose their fingerprints, so the numbers of GPUs of equal fingerprints may differ.
    gpus = zip(*(profile.gpus for profile in profiles), strict=False)
    return Profile(_mean_device([profile.cpu for profile in profiles]), tuple(map(_mean_device, gpus)))


def _mean_device(devices: Sequence[DeviceProfile]) -> DeviceProfile:
    return DeviceProfile(
        fmean(device.read_bytes_s for device in devices),
        fmean(device.int8_macs_s for device in devices),
        mean_step_times([device.concurrent for device in devices]),
        mean_step_times([device.isolated for device in devices]),
        _mean_product_times([device.products for device in devices]),
        _mean_product_times([device.isolated_products for device in devices]),
        _mean_limits([device.isolated_limits for device in devices if device.isolated_limits is not None]),
    )


def _mean_limits(limits: Sequence[Limits]) -> Limits | None:
    if not limits:
        return None
    return Limits(fmean(each.read_bytes_s for each in limits), fmean(each.int8_macs_s for each in limits))


def mean_step_times(series: Sequence[StepTimes]) -> StepTimes:
    points = zip(*filter(None, series), strict=False)
    return tuple(StepTime(group[0].rows, *map(fmean, zip(*map(_values, group), strict=True))) for group in points)


def _mean_product_times(series: Sequence[ProductTimes]) -> ProductTimes:
    groups: dict[tuple[int, int], list[float]] = {}
    for time in chain.from_iterable(series):
        groups.setdefault(_place(time), []).append(time.byte_s)
    return tuple(ProductTime(*place, fmean(found)) for place, found in sorted(groups.items()))


def _joined(new: ProductTimes, known: ProductTimes) -> ProductTimes:
    types = {time.quant_type for time in new}
    return tuple(sorted((*new, *(time for time in known if time.quant_type not in types)), key=_place))


def _place(time: ProductTime) -> tuple[int, int]:
    return time.quant_type, time.rows


def _values(point: StepTime) -> tuple[float, ...]:
    return point.stage_s, point.layers_byte_s, point.head_s
