"""Parameters of sampling. Each numeric parameter is a row of the sampling table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from llamaclust.core.sampling.bounds import MAX_PENALTY, MAX_TOP_K
from llamaclust.core.sampling.fields import number, rows_of
from llamaclust.core.sampling.sampler_chain import SamplerChain


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
        """True if a choice depends on more than the earlier tokens. Mirostat depends on `mu` in the last result."""
        return self.chain is not None and self.chain.mirostat != 0

    @property
    def for_drafts(self) -> SamplingParams:
        return replace(self, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, chain=None)


PARAMS: Final = rows_of(SamplingParams)
