"""Steps that weigh the channels of a row, or mix its equal parts by coefficients of the row."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.row_steps import Buffer


@dataclass(frozen=True, slots=True)
class ScaleByWeight:
    """out = x * the number in `weight` [1], or `by_channel` each channel times its own, weight [x.width]; out may be
    x."""

    x: Buffer
    out: Buffer
    weight: str
    by_channel: bool = False


@dataclass(frozen=True, slots=True)
class Mix:
    """out_i = y_i + sum over j of (coefficients[i, j] + offset) * x_j, where x_j, y_i and out_i are the parts of a row,
    of `width` channels each. Without coefficients, every part of x is added as it is. Parts of y before `first` are
    copied.

    coefficients [rows, parts of out * parts of x]; out may be y, and neither x nor coefficients.
    """

    x: Buffer
    y: Buffer
    out: Buffer
    width: int
    coefficients: Buffer | None = None
    offset: float = 0.0
    first: int = 0


@dataclass(frozen=True, slots=True)
class MatchMagnitude:
    """out_i = x_i * sqrt(mean(y^2)) / sqrt(max(mean(x_i^2), epsilon)) for each of the parts x_i of x, which are as wide
    as y; out may be x."""

    x: Buffer
    y: Buffer
    out: Buffer
    epsilon: float


@dataclass(frozen=True, slots=True)
class GaussianTopK:
    """out = max(x - (mean(x) + factor * standard deviation of x), 0), a row at a time: of normally distributed numbers,
    those above a quantile are left; out may be x."""

    x: Buffer
    out: Buffer
    factor: float


MixingStep = ScaleByWeight | Mix | MatchMagnitude | GaussianTopK
