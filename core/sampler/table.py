"""The sampling table: all numeric parameters with which a request controls sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.fields import SamplingField, number, rows_of
from llamaclust.core.sampler.params import CHAIN, PARAMS


@dataclass(frozen=True, slots=True)
class _Windows:
    repeat_last_n: int = number(
        (-1, MAX_CONTEXT_TOKENS),
        -1,
        "Number of last tokens, in prompt and answer together, that penalties count; -1 for all.",
        "N",
        llamacpp=64,
        ollama=64,
        gguf="penalty_last_n",
    )
    dry_penalty_last_n: int = number(
        (-1, MAX_CONTEXT_TOKENS), -1, "Number of last tokens that DRY examines; -1 for all.", "N"
    )


SAMPLING_TABLE: Final[Mapping[str, SamplingField]] = {**PARAMS, **rows_of(_Windows), **CHAIN}
"""All numeric sampling parameters of a request, by OpenAI's names, or else by vLLM's or llama.cpp's names."""

MAIN_NUMBERS: Final = ("temperature", "top_k", "top_p", "min_p")
"""The parameters that a chat always shows. Their defaults are llama.cpp's."""
