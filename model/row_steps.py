"""Buffers, and steps that compute a row of one from the same row of others, without weights or by a vector of them."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.step_options import ActivationFunction


@dataclass(frozen=True, slots=True)
class Buffer:
    """One activation matrix [rows, width] of float32, by name; equal names are the same memory."""

    name: str
    width: int


@dataclass(frozen=True, slots=True)
class SiluMul:
    """out = silu(gate) * up; out may be gate."""

    gate: Buffer
    up: Buffer
    out: Buffer


@dataclass(frozen=True, slots=True)
class Activate:
    """out = function(x); out may be x."""

    x: Buffer
    out: Buffer
    function: ActivationFunction


@dataclass(frozen=True, slots=True)
class Add:
    """out = x + y; out may be x."""

    x: Buffer
    y: Buffer
    out: Buffer


@dataclass(frozen=True, slots=True)
class Mul:
    """out = x * y; out may be x."""

    x: Buffer
    y: Buffer
    out: Buffer


@dataclass(frozen=True, slots=True)
class Scale:
    """out = x * factor, a float32; out may be x."""

    x: Buffer
    out: Buffer
    factor: float


@dataclass(frozen=True, slots=True)
class PositionScale:
    """out = x * (1 + factor * ln(1 + (position + offset) // length)), the number rounded to float32; out may be x."""

    x: Buffer
    out: Buffer
    factor: float
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class SoftCap:
    """out = cap * tanh(x / cap); out may be x."""

    x: Buffer
    out: Buffer
    cap: float


@dataclass(frozen=True, slots=True)
class Slice:
    """out = the channels [start, start + out.width) of x: one of the parts that a file's tensor computes together. Of
    several `heads`, x and out are equal parts, of each of which the same channels are taken."""

    x: Buffer
    out: Buffer
    start: int
    heads: int = 1


@dataclass(frozen=True, slots=True)
class Join:
    """out = the channels of x, then those of y, for each of the `heads` that all three are equal parts of; out is a
    third buffer."""

    x: Buffer
    y: Buffer
    out: Buffer
    heads: int = 1


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
