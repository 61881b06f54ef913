"""Figures of clusters that served the same requests in turns, and what they would be with all layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from ways import Reading

ONE, STAGES, GROUP = "one worker", "stages", "group"


@dataclass(frozen=True, slots=True)
class Sample:
    """A time by the client's clock; `reading`: for each token."""

    ms: float
    reading: Reading


Turn = Mapping[str, Sample]
"""Samples of all ways, measured one after the other."""


@dataclass(frozen=True, slots=True)
class Depth:
    """`layers` of the model were measured, and `shallow` ones beside; the whole has `whole` of them."""

    layers: int
    shallow: int
    whole: int

    def scale(self, deep: Sequence[Turn], few: Sequence[Turn], way: str) -> Callable[[float], float]:
        """Makes a time of the whole model out of one with `layers`: what does not depend on these counts once."""
        if self.layers == self.whole or not few:
            return lambda ms: ms
        most, least = (median(turn[way].ms for turn in turns) for turns in (deep, few))
        layer_ms = max(0.0, most - least) / (self.layers - self.shallow)
        fixed_ms = min(most, max(0.0, least - self.shallow * layer_ms))
        return lambda ms: fixed_ms + (ms - fixed_ms) * self.whole / self.layers


@dataclass(frozen=True, slots=True)
class Row:
    """One way beside one worker."""

    way: str
    raw_ms: float
    whole_ms: float
    ratios: tuple[float, ...]  # of the one worker's time to this way's, with all layers
    reading: Reading
    predicted_ms: float | None = None  # beside `raw_ms`

    def __str__(self) -> str:
        gain = f"{median(self.ratios):6.2f} ({min(self.ratios):.2f} .. {max(self.ratios):.2f})"
        used = " ".join(f"{ms:.2f}" for ms in self.reading.processor_ms)
        computed = f"{self.reading.compute_ms:9.2f} {self.reading.gathers_ms:8.2f}"
        known = self.predicted_ms
        predicted = "" if known is None else f"{known:.2f} {100 * (known / self.raw_ms - 1):+.0f} %"
        return f"{self.way:11}{self.raw_ms:10.2f}{predicted:>15}{self.whole_ms:11.2f} {gain:22}{computed}   {used}"


HEADER = (
    f"{'':11}{'ms':>10}{'predicted':>15}{'all layers':>11} {'one worker / this':22}{'computed':>9} {'gathers':>8}   "
    "processor time: coordinator, workers"
)


def rows(
    turns: Sequence[Turn], few: Sequence[Turn], depth: Depth, ways: Iterable[str], predicted: Mapping[str, float]
) -> list[Row]:
    """`predicted`: milliseconds by way, as far as they are known."""
    found, scales = list[Row](), {way: depth.scale(turns, few, way) for way in ways}
    for way, scale in scales.items():
        whole = [scale(turn[way].ms) for turn in turns]
        ratios = tuple(scales[ONE](turn[ONE].ms) / ms for turn, ms in zip(turns, whole, strict=True))
        readings = [turn[way].reading for turn in turns]
        raw_ms = median(turn[way].ms for turn in turns)
        found.append(Row(way, raw_ms, median(whole), ratios, _mean(readings), predicted.get(way)))
    return found


def _mean(readings: Sequence[Reading]) -> Reading:
    return Reading(
        mean(each.compute_ms for each in readings),
        mean(each.gathers_ms for each in readings),
        tuple(mean(times) for times in zip(*(each.processor_ms for each in readings), strict=True)),
    )
