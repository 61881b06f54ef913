"""What workers measure of themselves, in SI units."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from llamaclust.core.bounds import Integer, Rate, Real, Size
from llamaclust.core.errors import ProtocolError

_Seconds = Annotated[float, Real(0.0, 3600.0)]


@dataclass(frozen=True, slots=True)
class StageProfile:
    """What a step takes: stage_s + layers_byte_s * bytes of its layers' weights + head_s on the last stage."""

    rows: Annotated[int, Integer(1, 1 << 16)]
    stage_s: _Seconds
    layers_byte_s: _Seconds
    head_s: _Seconds


StageProfiles = Annotated[tuple[StageProfile, ...], Size(0, 16)]
"""By ascending rows; none where the model's file is missing or memory is short."""


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """Rates of the kernels on a GPU, and step times of the model there."""

    read_bytes_s: Rate
    int8_macs_s: Rate
    stages: StageProfiles = ()

    def check(self) -> None:
        check_ascending(self.stages)


def check_ascending(stages: tuple[StageProfile, ...]) -> None:
    """ProtocolError where rows do not ascend."""
    if any(first.rows >= second.rows for first, second in pairwise(stages)):
        raise ProtocolError("stage profiles: their rows must ascend")
