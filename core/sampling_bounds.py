"""Bounds of sampling parameters, for the scheduler and the wire."""

from __future__ import annotations

from collections.abc import Mapping

MAX_TOP_K = (1 << 31) - 1
MAX_PENALTY = 1000.0
MAX_BIAS = 1e9  # added to a logit: a token that is never chosen, or always

REAL_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1 / MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
}
"""Least and greatest value of each decimal number among SamplingParams."""

CHAIN_BOUNDS: Mapping[str, tuple[float, float]] = {
    "top_n_sigma": (-1.0, 100.0),
    "tfs_z": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dynatemp_range": (0.0, 100.0),
    "dynatemp_exponent": (0.0, 100.0),
    "dry_multiplier": (0.0, MAX_PENALTY),
    "dry_base": (1.0, MAX_PENALTY),
    "mirostat_tau": (0.0, 100.0),
    "mirostat_eta": (0.0, 100.0),
}
"""Likewise among those of a SamplerChain."""

MAX_LOGIT_BIASES = 1024
MAX_MIROSTAT = 2
MAX_MU = 1e12
MAX_BREAKERS = 1 << 16  # token sequences of one request that DRY does not look beyond
MAX_BREAKER_TOKENS = 64  # tokens of each
MAX_BREAKERS_TOKENS = 1 << 15  # tokens of all of them: those that matter go to the last stage with every token
MAX_GRAMMAR_BYTES = 1 << 20
MAX_GBNF_WORK = 1 << 25  # rules times characters: the time to convert them, about a second
MAX_TRIGGERS = 64
MAX_TRIGGER_BYTES = 1024
MAX_FORCED_TOKENS = 64  # that one output row may add to the sampled one
MAX_DRAFTED_TOKENS = 32  # that an MTP head adds likewise
MAX_MATCHER_NS = 60_000_000_000  # processor time of a row's matcher; answers are given up long before
MAX_REASONING_END_TOKENS = 1 << 14  # that end reasoning whose budget is used up
