"""Fields of all bodies that say how tokens are sampled, made from the sampling table (core/sampling.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model

from llamaclust.cluster.front.fields.adapters import AdapterFields
from llamaclust.cluster.front.fields.speculative import SpeculativeFields
from llamaclust.cluster.front.schema import Body, SeedField
from llamaclust.cluster.front.text.request import MAX_SALT_CHARACTERS, CompletionRequest
from llamaclust.cluster.scheduler.breakers import DEFAULT_BREAKERS
from llamaclust.cluster.scheduler.validation import check_chain
from llamaclust.core.sampler_chain import CHAIN, PLAIN_ORDER, SAMPLERS, SamplerChain, SamplerName
from llamaclust.core.sampling import PARAMS, SAMPLING_TABLE, Grammar, SamplingParams
from llamaclust.core.sampling_bounds import MAX_TOP_K, Dialect

_AnyFields = TypeVar("_AnyFields", bound="SamplerFields")

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


def _openai_top_k(value: int) -> int:
    return 0 if value == -1 else value


_TOP_K = {
    Dialect.OPENAI: Annotated[int, AfterValidator(_openai_top_k), documented(-1, MAX_TOP_K)],
    Dialect.LLAMACPP: Annotated[int, AfterValidator(partial(max, 0))],
    Dialect.OLLAMA: Annotated[int, AfterValidator(partial(max, 0))],
}
"""Where all tokens are kept, some APIs say it by negative numbers."""


def _declared(name: str, own_name: str, dialect: Dialect) -> tuple[Any, Any]:
    """The type and the field of a number in bodies of the dialect."""
    row = SAMPLING_TABLE[name]
    kind: Any = int if row.is_whole else float
    if name == "top_k":
        kind = _TOP_K[dialect]
    elif own_name == name:
        kind = Annotated[kind, documented(row.low, row.high)]
    else:  # the scheduler would name the other name
        kind = Annotated[kind, Field(ge=row.low, le=row.high)]
    return kind, Field(row.default_in(dialect), description=row.doc)


def sampled(dialect: Dialect, *, without: Sequence[str] = ()) -> Callable[[type[_AnyFields]], type[_AnyFields]]:
    """Adds the numbers of the sampling table to a body, by the dialect's names and with its defaults."""

    def add(kind: type[_AnyFields]) -> type[_AnyFields]:
        names = {name: row.name_in(dialect, name) for name, row in SAMPLING_TABLE.items() if name not in without}
        numbers: dict[str, Any] = {own_name: _declared(name, own_name, dialect) for name, own_name in names.items()}
        made = create_model(kind.__name__, __base__=kind, __module__=kind.__module__, __doc__=kind.__doc__, **numbers)
        made.own_names = names
        return made

    return add


_NAMES: dict[str, Any] = {"anyOf": [{"type": "array", "items": {"enum": list(SAMPLERS)}}, {"type": "string"}]}
SamplersField = Annotated[tuple[SamplerName, ...], BeforeValidator(_samplers), WithJsonSchema(_NAMES)]
TextsField = Annotated[
    tuple[str, ...], BeforeValidator(_texts), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]


class SamplerFields(Body):
    """How tokens are sampled; the decorator `sampled` adds the numbers."""

    own_names: ClassVar[Mapping[str, str]]  # of the numbers of the sampling table that the body has

    dry_sequence_breakers: TextsField = DEFAULT_BREAKERS
    """Texts that end a repetition for DRY."""
    penalize_nl: bool = True
    """False: penalties do not apply to line breaks."""
    samplers: SamplersField = SAMPLERS
    """The samplers that apply, in this order."""

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """Returns values of the sampling table's fields by name; the body may call them differently."""
        own_names = self.own_names
        return {name: getattr(self, own_names[name]) for name in names}

    def params(self, logit_bias: tuple[tuple[int, float], ...] = ()) -> SamplingParams:
        """Raises ParameterError for a number of a chain that is out of bounds; the scheduler checks the others."""
        return SamplingParams(**self.numbers(PARAMS), logit_bias=logit_bias, chain=self._chain())

    def _chain(self) -> SamplerChain | None:
        """The samplers that change anything, in their order; None where the plain ones do the same."""
        chain = SamplerChain(self.samplers, **self.numbers(CHAIN))
        check_chain(chain)
        chain = replace(chain, order=_effective_order(chain))
        is_plain = chain.order == PLAIN_ORDER and not chain.mirostat and not chain.dynatemp_range
        return None if is_plain else chain

    @property
    def dry_window(self) -> int | None:
        """None: all tokens."""
        return self._window("dry_penalty_last_n")

    @property
    def penalty_window(self) -> int | None:
        """None: all tokens."""
        return self._window("repeat_last_n") if "repeat_last_n" in self.own_names else None

    def _window(self, name: str) -> int | None:
        tokens: int = self.numbers((name,))[name]
        return None if tokens == -1 else tokens


@sampled(Dialect.OPENAI, without=("repeat_last_n",))
class AnswerFields(SamplerFields, AdapterFields, SpeculativeFields):
    """Of one answer to one chat, where an API has no more to say of how tokens are sampled."""

    stream: bool = False
    """Server-sent events."""
    seed: SeedField = None
    """The same seed gives the same answer; drawn where it is absent or -1."""
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARACTERS)
    """Only requests with the same share their prompts' beginnings in the prefix cache."""

    def completion(
        self, max_new_tokens: int | None, stop: tuple[str, ...], grammar: Grammar | None
    ) -> CompletionRequest:
        """Without a prompt."""
        return CompletionRequest(
            (),
            max_new_tokens,
            self.params(),
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
