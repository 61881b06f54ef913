"""Fields of samplers beyond the plain ones, by llama.cpp's names, which all endpoints share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from llamaclust.cluster.api.schema import Body
from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS
from llamaclust.core.limits import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler_chain import PLAIN_ORDER, SAMPLERS, SamplerChain, SamplerName
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, MAX_MIROSTAT

_OTHER_NAMES = {
    "nucleus": SamplerName.TOP_P,
    "temp": SamplerName.TEMPERATURE,
    "typ": SamplerName.TYPICAL_P,
    "typical_p": SamplerName.TYPICAL_P,
}
_LETTERS = dict(zip("edskfypmxt", SAMPLERS, strict=True))


def _steps(value: Any) -> tuple[SamplerName, ...]:
    """A list of names, or a string of llama.cpp's letters for them."""
    if isinstance(value, str):
        steps = [_LETTERS.get(letter) or _unknown(letter) for letter in value]
    elif isinstance(value, list) and all(isinstance(name, str) for name in value):
        steps = [_step(name) for name in value]
    else:
        raise ValueError("must be a list of samplers' names")
    if len(set(steps)) < len(steps):
        raise ValueError("a sampler stands there twice")
    return tuple(steps)


def _step(name: str) -> SamplerName:
    plain = name.replace("-", "_")
    return _OTHER_NAMES.get(plain) or next((step for step in SAMPLERS if step == plain), None) or _unknown(name)


def _unknown(name: str) -> SamplerName:
    raise ValueError(f"{name[:60]!r} is none of {', '.join(SAMPLERS)}")


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def _bounded(name: str) -> Any:
    low, high = CHAIN_BOUNDS[name]
    return Field(ge=low, le=high)


_NAMES: dict[str, Any] = {"anyOf": [{"type": "array", "items": {"enum": list(SAMPLERS)}}, {"type": "string"}]}
StepsField = Annotated[tuple[SamplerName, ...], BeforeValidator(_steps), WithJsonSchema(_NAMES)]
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
    dry_allowed_length: Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)] = 2
    """Shorter repetitions cost nothing."""
    dry_penalty_last_n: Annotated[int, Field(ge=-1, le=MAX_CONTEXT_TOKENS)] = -1
    """Last tokens that DRY looks at; -1: all."""
    dry_sequence_breakers: TextsField = DEFAULT_BREAKERS
    """No repetition goes beyond these texts."""
    mirostat: Annotated[int, Field(ge=0, le=MAX_MIROSTAT)] = 0
    """1, 2: Mirostat of that version keeps the surprise near `mirostat_tau`; of the other samplers, penalties, DRY and
    temperature act alone."""
    mirostat_tau: Annotated[float, _bounded("mirostat_tau")] = 5.0
    """In bits."""
    mirostat_eta: Annotated[float, _bounded("mirostat_eta")] = 0.1
    """How fast it learns."""
    penalize_nl: bool = True
    """Penalties count line breaks too."""
    samplers: StepsField = SAMPLERS
    """Which samplers act, and in which order; what is not among them does not act."""

    def chain(self) -> SamplerChain | None:
        """None where the plain samplers in their order do the same."""
        settings = {name: getattr(self, name) for name in CHAIN_BOUNDS}
        chain = SamplerChain(
            self._order(), dry_allowed_length=self.dry_allowed_length, mirostat=self.mirostat, **settings
        )
        is_plain = chain.order == PLAIN_ORDER and not self.mirostat and not self.dynatemp_range
        return None if is_plain else chain

    def _order(self) -> tuple[SamplerName, ...]:
        """Those that do something."""
        off = {
            SamplerName.DRY: self.dry_multiplier == 0,
            SamplerName.TOP_N_SIGMA: self.top_n_sigma <= 0,
            SamplerName.TFS_Z: self.tfs_z == 1,
            SamplerName.TYPICAL_P: self.typical_p == 1,
            SamplerName.XTC: self.xtc_probability == 0 or self.xtc_threshold > 0.5,
        }
        if self.mirostat:
            before = [
                step for step in self.samplers if step in (SamplerName.PENALTIES, SamplerName.DRY) and not off.get(step)
            ]
            return (*before, SamplerName.TEMPERATURE)
        return tuple(step for step in self.samplers if not off.get(step))

    @property
    def dry_window(self) -> int | None:
        """None: all tokens."""
        return None if self.dry_penalty_last_n == -1 else self.dry_penalty_last_n
