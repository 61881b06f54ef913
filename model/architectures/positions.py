"""RoPE frequencies and ALiBi slopes, computed with decimal numbers, because libm differs between machines."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown
from llamaclust.model.hyperparameters import RopeParameters, RopeScaling
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.program import RopeTable

_DIGITS = Context(prec=50)
MAX_ALIBI_BIAS = 8
_SECTIONS_KEY = "rope.dimension_sections"
_LEAST_SECTIONS, _MOST_SECTIONS = 3, 4  # Time, height, width and the rest.
_PI = Decimal("3.14159265358979323846264338327950288419716939937510")


@lru_cache(maxsize=64)
def rope_table(rope: RopeParameters, factors: tuple[float, ...] | None = None) -> RopeTable:
    """Returns the RoPE table with scaled frequencies. The unscaled frequency of channel pair i is base^(-2 i /
    dimensions), divided by factors[i] if there are factors."""
    with localcontext(_DIGITS):
        plain = _plain_frequencies(rope, factors)
        stretched = [frequency / Decimal(rope.factor) for frequency in plain]
        if rope.scaling is RopeScaling.YARN and rope.extrapolation_factor != 0:
            shares = _yarn_shares(rope)
            mixed = [s * (1 - share) + p * share for s, p, share in zip(stretched, plain, shares, strict=True)]
            tenth = Decimal(rope.factor).ln() / 10
            divisor = 1 + Decimal(rope.log_multiplier) * tenth
            magnitude = Decimal(rope.attention_factor) * (1 + tenth) / divisor
            return RopeTable(tuple(map(float, mixed)), float(magnitude))
        return RopeTable(tuple(map(float, stretched)), rope.attention_factor)


def _plain_frequencies(rope: RopeParameters, factors: tuple[float, ...] | None) -> list[Decimal]:
    pairs = rope.dimension_count // 2
    log_base = Decimal(rope.frequency_base).ln()
    frequencies = [(-log_base * i / pairs).exp() for i in range(pairs)]
    if factors is None:
        return frequencies
    return [frequency / Decimal(factor) for frequency, factor in zip(frequencies, factors, strict=True)]


def _yarn_shares(rope: RopeParameters) -> list[Decimal]:
    """Returns the weight of the unscaled frequency for each channel pair in YaRN (arXiv 2309.00071, section 3.2)."""
    if rope.frequency_base <= 1:
        raise ModelFileError(f"metadata rope.freq_base: expected more than 1 with YaRN, found {rope.frequency_base:g}")
    last = Decimal(rope.dimension_count - 1)
    first_slow, last_fast = _pair_with_turns(rope, rope.beta_slow), _pair_with_turns(rope, rope.beta_fast)
    if rope.truncated:
        last_fast, first_slow = last_fast.to_integral_value(ROUND_FLOOR), first_slow.to_integral_value(ROUND_CEILING)
    low, high = max(Decimal(0), last_fast), min(last, first_slow)
    width = max(Decimal("0.001"), high - low)
    slow = [min(Decimal(1), max(Decimal(0), (i - low) / width)) for i in range(rope.dimension_count // 2)]
    return [(1 - share) * Decimal(rope.extrapolation_factor) for share in slow]


def _pair_with_turns(rope: RopeParameters, turns: float) -> Decimal:
    """Returns the fractional index of the channel pair that makes `turns` full rotations over the original context."""
    per_turn = Decimal(rope.original_context_length) / (Decimal(turns) * 2 * _PI)
    return rope.dimension_count * per_turn.ln() / (2 * Decimal(rope.frequency_base).ln())


def yarn_score_scale(rope: RopeParameters, multiplier: float, width: int) -> float:
    """Returns the scale of attention scores in heads of `width` channels with YaRN. As in llama.cpp, it is 1 /
    sqrt(width), times the square of the scale of cos and sin, times the square of 1 + 0.1 * multiplier * ln(factor)."""
    with localcontext(_DIGITS):
        tenth = Decimal(rope.factor).ln() / 10
        magnitude = Decimal(rope.attention_factor) * (1 + tenth) / (1 + Decimal(rope.log_multiplier) * tenth)
        magnitude *= 1 + Decimal(multiplier) * tenth
        return float(magnitude * magnitude / Decimal(width).sqrt())


def rope_sections(keys: ModelKeys, pairs: int, *, interleaved: bool) -> tuple[int, ...]:
    """Returns the section of each channel pair: 0 for time, 1 for height, 2 for width, or 3 for the file's fourth
    section. If `interleaved`, consecutive pairs alternate between the first three. Otherwise, a section's pairs are
    adjacent. Raises ModelFileError if sections are missing or too long."""
    key = _SECTIONS_KEY
    sections = keys.integers(key, _MOST_SECTIONS)
    if len(sections) < _LEAST_SECTIONS:
        raise keys.error(key, f"expected {_LEAST_SECTIONS} sections or more, found {len(sections)}")
    if min(sections) < 0 or sum(sections) > pairs:
        what = f"found {shown(str(list(sections)))}, with a sum of {sum(sections)}; expected non-negative numbers"
        raise keys.error(key, f"{what} with a sum of at most {pairs} (rotated pairs)")
    # llama.cpp puts the remaining pairs into the fourth section. In existing models, these pairs turn very slowly.
    if interleaved:
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(pairs))
    runs = [section for section, count in enumerate(sections) for _ in range(count)]
    return *runs, *(0 for _ in range(pairs - len(runs)))


def text_sections(keys: ModelKeys, pairs: int) -> tuple[int, ...] | None:
    """Returns each channel pair's RoPE section, or None if the file has none because the model reads no images."""
    if not keys.has(_SECTIONS_KEY) or not any(keys.integers(_SECTIONS_KEY, _MOST_SECTIONS)):
        return None
    return rope_sections(keys, pairs, interleaved=False)


@lru_cache(maxsize=64)
def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Returns the ALiBi slope of each head, as float32 (arXiv 2108.12409, and its authors' code for head counts that
    are not powers of two)."""
    whole = 1 << (heads.bit_length() - 1)
    exponents = [(h + 1, whole) for h in range(whole)] + [(2 * h + 1, 2 * whole) for h in range(heads - whole)]
    with localcontext(_DIGITS):
        log = Decimal(2).ln() * MAX_ALIBI_BIAS
        return tuple(float(np.float32(float((-log * part / of).exp()))) for part, of in exponents)
