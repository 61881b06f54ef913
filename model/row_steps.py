"""Buffers, and steps that compute a row of one from the same row of others without weights."""

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
