"""Samplers beyond the plain ones, and the order of all of them (rules: docs/numerics.md)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SamplerName(StrEnum):
    """A sampler by llama.cpp's name. The order here is the default one."""

    PENALTIES = "penalties"
    DRY = "dry"
    TOP_N_SIGMA = "top_n_sigma"
    TOP_K = "top_k"
    TFS_Z = "tfs_z"
    TYPICAL_P = "typ_p"
    TOP_P = "top_p"
    MIN_P = "min_p"
    XTC = "xtc"
    TEMPERATURE = "temperature"


SAMPLERS = tuple(SamplerName)
"""By the number that they have on the wire and in kernels."""

PLAIN_ORDER = (SamplerName.PENALTIES, SamplerName.TOP_K, SamplerName.TOP_P, SamplerName.MIN_P, SamplerName.TEMPERATURE)
"""What is done without a chain. The same as a chain gives the same tokens."""


@dataclass(frozen=True, slots=True)
class SamplerChain:
    """What is done to logits, step after step; settings of a step that is not in `order` mean nothing."""

    order: tuple[SamplerName, ...] = PLAIN_ORDER  # each once at most
    top_n_sigma: float = 0.0  # tokens within so many standard deviations of the best logit
    tfs_z: float = 1.0  # tail-free: the share of the curve's bends that is kept
    typical_p: float = 1.0  # tokens of the most typical surprise, until they reach this probability
    xtc_probability: float = 0.0  # how often all but the last token above the threshold are taken out
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0  # the temperature goes with the entropy, by so much down and up
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0  # multiplier * base ^ (length of the repetition - allowed length) is subtracted
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    mirostat: int = 0  # 1, 2: chooses after all steps, so that the surprise stays near tau
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1  # how fast it learns
    unpenalized: tuple[int, ...] = ()  # ids that penalties leave alone (the line break)

    @property
    def needs_history(self) -> bool:
        return SamplerName.DRY in self.order

    @property
    def first_mu(self) -> float:
        """What Mirostat takes for the surprise to allow before its first token."""
        return 2 * self.mirostat_tau
