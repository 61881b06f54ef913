"""Parameters of sampling. Each numeric parameter is a row of the sampling table. The rules of the samplers are in
docs/internals/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_PENALTY, MAX_TOP_K
from llamaclust.core.sampler.fields import number, rows_of


class SamplerName(StrEnum):
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
"""All samplers. Messages and kernels use a sampler's index as its number."""

PLAIN_ORDER = (SamplerName.PENALTIES, SamplerName.TOP_K, SamplerName.TOP_P, SamplerName.MIN_P, SamplerName.TEMPERATURE)
"""The default order of samplers. A SamplerChain that sets only this order has no effect."""


@dataclass(frozen=True, slots=True)
class SamplerChain:
    """The samplers to run, in `order`, and their settings. Settings of other samplers have no effect."""

    order: tuple[SamplerName, ...] = PLAIN_ORDER  # Each sampler may occur once.
    top_n_sigma: float = number(
        (-1.0, 100.0),
        -1.0,
        "Keeps tokens whose logits are within this many standard deviations of the highest; 0 or less keeps all.",
    )
    tfs_z: float = number(
        (0.0, 1.0),
        1.0,
        "Tail-free sampling: keeps the most probable tokens up to where the probability curve is flat; 1 keeps all.",
        "Z",
    )
    typical_p: float = number(
        (0.0, 1.0),
        1.0,
        "Typical sampling: keeps tokens with surprise nearest the average, up to this total probability; 1 keeps all.",
        "P",
    )
    xtc_probability: float = number(
        (0.0, 1.0),
        0.0,
        "XTC: how often it removes all tokens above the threshold except the least probable of them; 0 for never.",
        "P",
        gguf="xtc_probability",
    )
    xtc_threshold: float = number(
        (0.0, 1.0),
        0.1,
        "Probability from which XTC removes tokens; above 0.5, it removes none.",
        "P",
        gguf="xtc_threshold",
    )
    dynatemp_range: float = number(
        (0.0, 100.0),
        0.0,
        "Dynamic temperature: from temperature - range to temperature + range, by the entropy; 0 for off.",
    )
    dynatemp_exponent: float = number(
        (0.0, 100.0), 1.0, "Exponent of entropy / maximum entropy in the dynamic temperature."
    )
    dry_multiplier: float = number(
        (0.0, MAX_PENALTY),
        0.0,
        "DRY: subtracts multiplier * base ^ (length - allowed length) from tokens that extend a repetition; 0 for off.",
    )
    dry_base: float = number((1.0, MAX_PENALTY), 1.75, "Base of DRY's penalty.")
    dry_allowed_length: int = number((1, MAX_CONTEXT_TOKENS), 2, "Shorter repetitions are not penalized.", "N")
    mirostat: int = number(
        (0, 2),
        0,
        "Mirostat version (1 or 2), which disables other samplers except penalties, DRY and temperature; 0 for off.",
        "N",
        gguf="mirostat",
    )
    mirostat_tau: float = number((0.0, 100.0), 5.0, "Mirostat's target surprise in bits.", gguf="mirostat_tau")
    mirostat_eta: float = number((0.0, 100.0), 0.1, "Mirostat's learning rate.", gguf="mirostat_eta")
    unpenalized: tuple[int, ...] = ()  # Token ids that penalties do not change (the line break).

    @property
    def needs_history(self) -> bool:
        return SamplerName.DRY in self.order

    @property
    def first_mu(self) -> float:
        return 2 * self.mirostat_tau


CHAIN: Final = rows_of(SamplerChain)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. The defaults choose the most probable token. docs/internals/numerics.md has the steps."""

    temperature: float = number(
        (0.0, 100.0),
        1.0,
        "Sampling temperature, which divides the logits; 0 for greedy.",
        neutral=0.0,
        llamacpp=0.8,
        ollama=0.8,
        gguf="temp",
    )
    top_k: int = number(
        (0, MAX_TOP_K),
        0,
        "Keeps only this many of the most probable tokens; 0 keeps all.",
        "N",
        llamacpp=40,
        ollama=40,
        gguf="top_k",
    )
    top_p: float = number(
        (0.0, 1.0),
        1.0,
        "Keeps the most probable tokens up to this cumulative probability; 1 keeps all.",
        "P",
        llamacpp=0.95,
        ollama=0.9,
        gguf="top_p",
    )
    min_p: float = number(
        (0.0, 1.0),
        0.0,
        "Keeps tokens with at least this fraction of the top token's probability; 0 keeps all.",
        "P",
        llamacpp=0.05,
        gguf="min_p",
    )
    repetition_penalty: float = number(
        (1 / MAX_PENALTY, MAX_PENALTY),
        1.0,
        "Divides positive and multiplies negative logits of tokens that occurred; 1 for off.",
        ollama=1.1,
        llamacpp_name="repeat_penalty",
        gguf="penalty_repeat",
    )
    frequency_penalty: float = number(
        (-MAX_PENALTY, MAX_PENALTY), 0.0, "Subtracted from a token's logit for each time it occurred; 0 for off."
    )
    presence_penalty: float = number(
        (-MAX_PENALTY, MAX_PENALTY), 0.0, "Subtracted from a token's logit if it occurred; 0 for off."
    )
    # Pairs (token id, number added to the token's logit), in ascending order of id.
    logit_bias: tuple[tuple[int, float], ...] = ()
    chain: SamplerChain | None = None  # More samplers, or another order of samplers.

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def needs_state(self) -> bool:
        """True if sampling needs Mirostat's state `mu` from the previous result."""
        return self.chain is not None and self.chain.mirostat != 0

    @property
    def for_drafts(self) -> SamplingParams:
        return replace(self, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, chain=None)


PARAMS: Final = rows_of(SamplingParams)
