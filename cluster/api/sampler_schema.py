"""Fields of samplers beyond the plain ones, by llama.cpp's names, which all endpoints share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from llamaclust.cluster.api.schema import Body
from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS
from llamaclust.cluster.text.samplers import effective_chain, parse_samplers
from llamaclust.core.limits import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler_chain import SAMPLERS, SamplerChain, SamplerName
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, MAX_MIROSTAT


def read_texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def documented(low: float, high: float) -> Any:
    """Bounds for openapi.json; the scheduler checks them."""
    return Field(json_schema_extra={"minimum": low, "maximum": high})


def _bounded(name: str) -> Any:
    return documented(*CHAIN_BOUNDS[name])


_NAMES: dict[str, Any] = {"anyOf": [{"type": "array", "items": {"enum": list(SAMPLERS)}}, {"type": "string"}]}
SamplersField = Annotated[tuple[SamplerName, ...], BeforeValidator(parse_samplers), WithJsonSchema(_NAMES)]
TextsField = Annotated[
    tuple[str, ...], BeforeValidator(read_texts), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]


class SamplerFields(Body):
    """Off by default."""

    top_n_sigma: Annotated[float, _bounded("top_n_sigma")] = -1.0
    """Only tokens whose logits are within so many standard deviations of the likeliest's; 0 or less: all."""
    tfs_z: Annotated[float, _bounded("tfs_z")] = 1.0
    """Tail-free sampling: only the likeliest tokens up to where the curve of probabilities is flat; 1: all."""
    typical_p: Annotated[float, _bounded("typical_p")] = 1.0
    """Only the tokens of the most typical probability that reach this one together; 1: all."""
    xtc_probability: Annotated[float, _bounded("xtc_probability")] = 0.0
    """How often the likeliest tokens are taken out; 0: never."""
    xtc_threshold: Annotated[float, _bounded("xtc_threshold")] = 0.1
    """All that are at least so likely but the last of them; above 0.5: none."""
    dynatemp_range: Annotated[float, _bounded("dynatemp_range")] = 0.0
    """The temperature is by so much lower where the model is sure, and higher where it is not."""
    dynatemp_exponent: Annotated[float, _bounded("dynatemp_exponent")] = 1.0
    """How it goes with the entropy."""
    dry_multiplier: Annotated[float, _bounded("dry_multiplier")] = 0.0
    """DRY: multiplier * base ^ (tokens repeated - allowed length) is subtracted from what repeats; 0: off."""
    dry_base: Annotated[float, _bounded("dry_base")] = 1.75
    """That base."""
    dry_allowed_length: Annotated[int, documented(1, MAX_CONTEXT_TOKENS)] = 2
    """Shorter repetitions cost nothing."""
    dry_penalty_last_n: Annotated[int, documented(-1, MAX_CONTEXT_TOKENS)] = -1
    """Last tokens that DRY looks at; -1: all."""
    dry_sequence_breakers: TextsField = DEFAULT_BREAKERS
    """No repetition goes beyond these texts."""
    mirostat: Annotated[int, documented(0, MAX_MIROSTAT)] = 0
    """1, 2: Mirostat of that version keeps the surprise near `mirostat_tau`; of the other samplers, penalties, DRY and
    temperature act alone."""
    mirostat_tau: Annotated[float, _bounded("mirostat_tau")] = 5.0
    """In bits."""
    mirostat_eta: Annotated[float, _bounded("mirostat_eta")] = 0.1
    """How fast it learns."""
    penalize_nl: bool = True
    """Penalties count line breaks too."""
    samplers: SamplersField = SAMPLERS
    """Which samplers act, and in which order; what is not among them does not act."""

    def chain(self) -> SamplerChain | None:
        """None where the plain samplers in their order do the same."""
        settings = {name: getattr(self, name) for name in CHAIN_BOUNDS}
        return effective_chain(self.samplers, self.dry_allowed_length, self.mirostat, settings)

    @property
    def dry_window(self) -> int | None:
        """None: all tokens."""
        return None if self.dry_penalty_last_n == -1 else self.dry_penalty_last_n
