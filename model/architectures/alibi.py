"""Slopes of attention with linear biases (ALiBi), in decimal arithmetic: the same numbers on every machine."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from functools import lru_cache

import numpy as np

MAX_BIAS = 8
_DIGITS = Context(prec=50)


@lru_cache(maxsize=64)
def alibi_slopes(heads: int) -> tuple[float, ...]:
    """A float32 for each head. With n = the greatest power of two that is not above `heads`: 2^(-8 (h + 1) / n) of the
    first n heads, and of the others every second one that 2 n heads would have, from the first on. (ALiBi, arXiv
    2108.12409, and the authors' rule for other numbers of heads.)"""
    whole = 1 << (heads.bit_length() - 1)
    exponents = [(h + 1, whole) for h in range(whole)] + [(2 * h + 1, 2 * whole) for h in range(heads - whole)]
    with localcontext(_DIGITS):
        log = Decimal(2).ln() * MAX_BIAS
        return tuple(float(np.float32(float((-log * part / of).exp()))) for part, of in exponents)
