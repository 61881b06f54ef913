"""Samplers beyond the plain ones, from a request's settings by llama.cpp's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamaclust.cluster.scheduler.validation import check_chain
from llamaclust.core.sampler_chain import PLAIN_ORDER, SAMPLERS, SamplerChain, SamplerName

_ALIASES = {
    "nucleus": SamplerName.TOP_P,
    "temp": SamplerName.TEMPERATURE,
    "typ": SamplerName.TYPICAL_P,
    "typical_p": SamplerName.TYPICAL_P,
}
_LETTERS = dict(zip("edskfypmxt", SAMPLERS, strict=True))


def parse_samplers(value: Any) -> tuple[SamplerName, ...]:
    """A list of names, or a string of llama.cpp's letters for them. Raises ValueError."""
    if isinstance(value, str):
        names = [_LETTERS.get(letter) or _unknown(letter) for letter in value]
    elif isinstance(value, list) and all(isinstance(name, str) for name in value):
        names = [_parse_name(name) for name in value]
    else:
        raise ValueError("must be a list of samplers' names")
    if len(set(names)) < len(names):
        raise ValueError("a sampler is listed twice")
    return tuple(names)


def _parse_name(name: str) -> SamplerName:
    plain = name.replace("-", "_")
    return _ALIASES.get(plain) or next((known for known in SAMPLERS if known == plain), None) or _unknown(name)


def _unknown(name: str) -> SamplerName:
    raise ValueError(f"{name[:60]!r} is none of {', '.join(SAMPLERS)}")


def effective_chain(
    samplers: tuple[SamplerName, ...], allowed_length: int, mirostat: int, settings: Mapping[str, Any]
) -> SamplerChain | None:
    """The samplers that change anything, in their order; None where the plain ones do the same. `settings` has the
    names of CHAIN_BOUNDS. Raises ParameterError for a setting out of bounds."""
    chain = SamplerChain(samplers, dry_allowed_length=allowed_length, mirostat=mirostat, **settings)
    check_chain(chain)
    chain = replace(chain, order=_effective_order(chain))
    is_plain = chain.order == PLAIN_ORDER and not chain.mirostat and not chain.dynatemp_range
    return None if is_plain else chain


def _effective_order(chain: SamplerChain) -> tuple[SamplerName, ...]:
    off = {
        SamplerName.DRY: chain.dry_multiplier == 0,
        SamplerName.TOP_N_SIGMA: chain.top_n_sigma <= 0,
        SamplerName.TFS_Z: chain.tfs_z == 1,
        SamplerName.TYPICAL_P: chain.typical_p == 1,
        SamplerName.XTC: chain.xtc_probability == 0 or chain.xtc_threshold > 0.5,
    }
    order = tuple(name for name in chain.order if not off.get(name))
    if chain.mirostat:
        penalties = (SamplerName.PENALTIES, SamplerName.DRY)
        return (*(name for name in order if name in penalties), SamplerName.TEMPERATURE)
    return order
