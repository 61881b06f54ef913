"""RoPE of queries and keys by a patch's row and column in its tile."""

from __future__ import annotations

from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.architectures.vision.attention import Rotation
from llamaclust.model.hyperparameters import RopeParameters, RopeScaling
from llamaclust.model.program import RopeTable
from llamaclust.model.steps.options import RopeStyle

HEIGHT, WIDTH = 0, 1
"""Indices of a patch's two RoPE positions: its row and its column."""


def halves(head_dim: int, base: float, style: RopeStyle, sections: tuple[int, int]) -> Rotation:
    """Returns RoPE that rotates the first half of a head's channel pairs by position `sections[0]`, and the second half
    by position `sections[1]`. Pair i of each half has the frequency base^(-4 i / head_dim)."""
    half = frequencies(head_dim // 2, base)
    return Rotation(style, RopeTable(half + half), _sections(len(half), sections))


def alternating(head_dim: int, base: float, style: RopeStyle, sections: tuple[int, int]) -> Rotation:
    """Returns RoPE with the same positions as `halves`. The frequencies are base^(-2 i / head_dim), for even i in the
    first half of the channel pairs, and for odd i in the second half."""
    whole = frequencies(head_dim, base)
    half = len(whole) // 2
    return Rotation(style, RopeTable(whole[::2] + whole[1::2]), _sections(half, sections))


def _sections(pairs: int, sections: tuple[int, int]) -> tuple[int, ...]:
    first, second = sections
    return (first,) * pairs + (second,) * pairs


def frequencies(dimension_count: int, base: float) -> tuple[float, ...]:
    plain = RopeParameters(
        dimension_count=dimension_count,
        frequency_base=base,
        scaling=RopeScaling.NONE,
        factor=1.0,
        original_context_length=1,
        attention_factor=1.0,
        extrapolation_factor=0.0,
        beta_fast=32.0,
        beta_slow=1.0,
    )
    return rope_table(plain).frequencies
