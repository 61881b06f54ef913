"""Fields of samplers beyond the plain ones, by llama.cpp's names, which all endpoints share."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from llamaclust.cluster.api.fields.adapters import AdapterFields
from llamaclust.cluster.api.fields.speculative import SpeculativeFields
from llamaclust.cluster.api.schema import Body, SeedField
from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS
from llamaclust.cluster.scheduler.validation import check_chain
from llamaclust.cluster.text.request import MAX_SALT_CHARACTERS, CompletionRequest
from llamaclust.core.limits import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler_chain import PLAIN_ORDER, SAMPLERS, SamplerChain, SamplerName
from llamaclust.core.sampling import Grammar, SamplingParams
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, MAX_MIROSTAT, MAX_TOP_K, REAL_BOUNDS

_ALIASES = {
    "nucleus": SamplerName.TOP_P,
    "temp": SamplerName.TEMPERATURE,
    "typ": SamplerName.TYPICAL_P,
    "typical_p": SamplerName.TYPICAL_P,
}
_LETTERS = dict(zip("edskfypmxt", SAMPLERS, strict=True))


def _samplers(value: Any) -> tuple[SamplerName, ...]:
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


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def documented(low: float, high: float) -> Any:
    """Bounds for openapi.json; the scheduler checks them."""
    return Field(json_schema_extra={"minimum": low, "maximum": high})


def _bounded(name: str) -> Any:
    return documented(*CHAIN_BOUNDS[name])


_NAMES: dict[str, Any] = {"anyOf": [{"type": "array", "items": {"enum": list(SAMPLERS)}}, {"type": "string"}]}
SamplersField = Annotated[tuple[SamplerName, ...], BeforeValidator(_samplers), WithJsonSchema(_NAMES)]
TextsField = Annotated[
    tuple[str, ...], BeforeValidator(_texts), WithJsonSchema({"type": "array", "items": {"type": "string"}})
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
        """The samplers that change anything, in their order; None where the plain ones do the same. ParameterError for
        a setting out of bounds."""
        settings = {name: getattr(self, name) for name in (*CHAIN_BOUNDS, "dry_allowed_length", "mirostat")}
        chain = SamplerChain(self.samplers, **settings)
        check_chain(chain)
        chain = replace(chain, order=_effective_order(chain))
        is_plain = chain.order == PLAIN_ORDER and not chain.mirostat and not chain.dynatemp_range
        return None if is_plain else chain

    @property
    def dry_window(self) -> int | None:
        """None: all tokens."""
        return None if self.dry_penalty_last_n == -1 else self.dry_penalty_last_n


class AnswerFields(SamplerFields, AdapterFields, SpeculativeFields):
    """Of one answer to one chat, where an API has no more to say of how tokens are sampled."""

    stream: bool = False
    """Server-sent events."""
    temperature: float = 1.0
    """0 chooses the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this probability together."""
    top_k: Annotated[int, documented(-1, MAX_TOP_K)] = 0
    """Only that many of the likeliest tokens; 0 and -1: all."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the top token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occurred."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it occurred."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit if it occurred."""
    seed: SeedField = None
    """The same seed gives the same answer; drawn where it is absent or -1."""
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARACTERS)
    """Only requests with the same share their prompts' beginnings in the prefix cache."""

    def completion(
        self, max_new_tokens: int | None, stop: tuple[str, ...], grammar: Grammar | None
    ) -> CompletionRequest:
        """Without a prompt."""
        params = SamplingParams(
            top_k=0 if self.top_k == -1 else self.top_k,
            chain=self.chain(),
            **{name: getattr(self, name) for name in REAL_BOUNDS},
        )
        return CompletionRequest(
            (),
            max_new_tokens,
            params,
            seed=self.seed,
            stop=stop,
            penalize_nl=self.penalize_nl,
            dry_window=self.dry_window,
            dry_breakers=self.dry_sequence_breakers,
            cache_salt=self.cache_salt,
            grammar=grammar,
            max_drafted=self.speculative,
        )


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
