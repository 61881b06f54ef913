"""Request fields that several APIs share: sampling, reasoning, speculation, slots, adapters, logprobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, create_model

from llamaclust.cluster.config.values import shown, switched
from llamaclust.cluster.front.foreign_fields import CHAT
from llamaclust.cluster.front.schema import Body, LenientContext, Prompt, SeedField
from llamaclust.cluster.front.text.images import PromptImages
from llamaclust.cluster.front.text.request import MAX_SALT_CHARACTERS, CompletionRequest
from llamaclust.cluster.scheduler.dry_breakers import DEFAULT_BREAKERS
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.validation import check_chain
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_ADAPTERS, AdapterScales
from llamaclust.core.sampler.bounds import MAX_TOP_K
from llamaclust.core.sampler.fields import Dialect
from llamaclust.core.sampler.params import (
    CHAIN,
    PARAMS,
    PLAIN_ORDER,
    SAMPLERS,
    SamplerChain,
    SamplerName,
    SamplingParams,
)
from llamaclust.core.sampler.table import MAIN_NUMBERS, SAMPLING_TABLE


@dataclass(frozen=True, slots=True)
class Requested:
    """Marks a field that is copied to the field `name` of `CompletionRequest`. `name` is "" if both names are equal."""

    name: str = ""


class SaltFields(Body):
    cache_salt: Annotated[str, Requested()] = Field(default="", max_length=MAX_SALT_CHARACTERS)
    """Salt of the prefix cache. Requests share cached prompt prefixes only if their salts are equal."""


class SlotFields(Body):
    id_slot: int = -1
    """Number of the slot that keeps the request's tokens for `POST /slots`. -1: no slot. Requires `api.slot_folder`."""

    @property
    def slot(self) -> int | None:
        return None if self.id_slot < 0 else self.id_slot


def read_scales(value: Any) -> AdapterScales:
    """Reads [{"id": number, "scale": scale}, ...]. Returns the scales sorted by id. Raises ValueError."""
    if not isinstance(value, list) or len(value) > MAX_ADAPTERS:
        raise ValueError(f"must be a list of at most {MAX_ADAPTERS} objects with 'id' and 'scale'")
    scales = dict(map(_lora_entry, value))
    if len(scales) < len(value):
        raise ValueError("an adapter is listed twice")
    return tuple(sorted(scales.items()))


def _lora_entry(value: Any) -> tuple[int, float]:
    if not isinstance(value, dict) or value.keys() != {"id", "scale"}:
        raise ValueError("an adapter must be an object with 'id' and 'scale'")
    number, scale = value["id"], value["scale"]
    if type(number) is not int or number < 0:
        raise ValueError("an id must be a whole number, 0 or more")
    if type(scale) not in (int, float) or not -MAX_ADAPTER_SCALE <= scale <= MAX_ADAPTER_SCALE:
        raise ValueError(f"a scale must be a number within {-MAX_ADAPTER_SCALE:g}..{MAX_ADAPTER_SCALE:g}")
    return number, float(scale)


SCALES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_ADAPTERS,
    "items": {
        "type": "object",
        "required": ["id", "scale"],
        "properties": {
            "id": {"type": "integer", "minimum": 0},
            "scale": {"type": "number", "minimum": -MAX_ADAPTER_SCALE, "maximum": MAX_ADAPTER_SCALE},
        },
        "additionalProperties": False,
    },
}


class AdapterFields(Body):
    lora: Annotated[AdapterScales | None, BeforeValidator(read_scales), WithJsonSchema(SCALES_SCHEMA)] = None
    """Adapters to use: [{"id": N, "scale": scale}, ...]. The default is the scales set by `POST /lora-adapters`."""


_FORMS: Final = f'give true, false, a number of drafted tokens from 0 to {MAX_WINDOW}, or {{"n_max": NUMBER}}'


def _most_drafted(value: Any, info: ValidationInfo) -> int | None:
    """Reads the maximum number of drafted tokens (None: the server decides). If `value` is a dict, reads `n_max`."""
    if isinstance(value, dict):
        for name in filter("n_max".__ne__, value):
            if not isinstance(info.context, LenientContext):
                raise ValueError(f"{shown(name)} is not a known key; {_FORMS}")
            info.context.ignore(f"speculative.{name}")
        value = value.get("n_max")
        if isinstance(value, dict | bool):
            raise ValueError(f"n_max: {shown(value)} is not possible; {_FORMS}")
    if value is None or (is_on := switched(value)):
        return None
    if is_on is False:
        return 0
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not is_whole or not 0 <= value <= MAX_WINDOW:
        raise ValueError(f"{shown(value)} is not possible; {_FORMS}")
    return int(value)


_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": MAX_WINDOW}
_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "boolean"},
        _COUNT,
        {"type": "object", "properties": {"n_max": _COUNT}},
        {"enum": ["auto", "on", "off"]},
    ]
}


class SpeculativeFields(Body):
    speculative: Annotated[
        int | None, BeforeValidator(_most_drafted), WithJsonSchema(_SCHEMA), Requested("max_drafted")
    ] = None
    """Maximum number of tokens to draft in a step, or {"n_max": N}. `false` drafts none. Answers do not change."""


_AnyFields = TypeVar("_AnyFields", bound="SamplerFields")

_ALIASES = {
    "nucleus": SamplerName.TOP_P,
    "temp": SamplerName.TEMPERATURE,
    "typ": SamplerName.TYPICAL_P,
    "typical_p": SamplerName.TYPICAL_P,
}
_INFILL: Final = "infill"
"""A sampler of llama.cpp that does not exist here. llama.vscode requests it."""
_LETTERS: Final[Mapping[str, str]] = {**dict(zip("edskfypmxt", SAMPLERS, strict=True)), "i": _INFILL}


def _samplers(value: Any, info: ValidationInfo) -> tuple[SamplerName, ...]:
    """Reads a list of names of samplers, or a string of llama.cpp's letters for samplers. Raises ValueError."""
    given = [_LETTERS.get(letter, letter) for letter in value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError("must be a list of samplers' names")
    if _INFILL in given and isinstance(info.context, LenientContext):
        info.context.ignore(f"samplers.{_INFILL}")
        given = [name for name in given if name != _INFILL]
    names = [_parse_name(name) for name in given]
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
    """Makes a field whose limits appear only in openapi.json. The scheduler checks the limits."""
    return Field(json_schema_extra={"minimum": low, "maximum": high})


def _openai_top_k(value: int) -> int:
    return 0 if value == -1 else value


_TOP_K = {
    Dialect.OPENAI: Annotated[int, AfterValidator(_openai_top_k), documented(-1, MAX_TOP_K)],
    Dialect.LLAMACPP: Annotated[int, AfterValidator(partial(max, 0))],
    Dialect.OLLAMA: Annotated[int, AfterValidator(partial(max, 0))],
}
"""Type of `top_k` in each dialect. Negative values keep all tokens. OpenAI's dialect allows only -1."""


def _declared(name: str, own_name: str, dialect: Dialect) -> tuple[Any, Any]:
    row = SAMPLING_TABLE[name]
    kind: Any = int if row.is_whole else float
    if name == "top_k":
        kind = _TOP_K[dialect]
    elif own_name == name:
        kind = Annotated[kind, documented(row.low, row.high)]
    else:  # An error of the scheduler would contain the sampling table's name, not the body's name.
        kind = Annotated[kind, Field(ge=row.low, le=row.high)]
    return kind, Field(row.default_in(dialect), description=row.doc)


def sampled(dialect: Dialect, *, without: Sequence[str] = ()) -> Callable[[type[_AnyFields]], type[_AnyFields]]:
    """Returns a class decorator that adds the fields of SAMPLING_TABLE with the dialect's names and defaults."""

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
    """Settings of the samplers. The class decorator `sampled` adds the numeric fields."""

    own_names: ClassVar[Mapping[str, str]]  # Names of this body's fields by their names in the sampling table.

    dry_sequence_breakers: Annotated[TextsField, Requested("dry_breakers")] = DEFAULT_BREAKERS
    """Texts at which the DRY sampler ends a repetition."""
    penalize_nl: Annotated[bool, Requested()] = True
    """False exempts line breaks from the penalties."""
    samplers: SamplersField = SAMPLERS
    """Samplers to apply, in this order."""

    def completion(
        self,
        prompt: Prompt | PromptImages,
        max_new_tokens: int | None,
        params: SamplingParams | None = None,
        **more: Any,
    ) -> CompletionRequest:
        """Returns the completion request of one prompt, with the `Requested` fields and the fields `more`."""
        marks = [(name, mark) for name, info in type(self).model_fields.items() for mark in info.metadata]
        own = {mark.name or name: getattr(self, name) for name, mark in marks if isinstance(mark, Requested)}
        windows = {"penalty_window": self.penalty_window, "dry_window": self.dry_window}
        return CompletionRequest(prompt, max_new_tokens, params or self.params(), **(windows | own | more))

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        own_names = self.own_names
        return {name: getattr(self, own_names[name]) for name in names}

    def params(self, logit_bias: tuple[tuple[int, float], ...] = ()) -> SamplingParams:
        """Returns the sampling parameters. Raises ParameterError if a number of the sampler chain is out of bounds."""
        return SamplingParams(**self.numbers(PARAMS), logit_bias=logit_bias, chain=self._chain())

    def _chain(self) -> SamplerChain | None:
        """Returns the samplers that have an effect, in order, or None if the default sampling gives the same result."""
        chain = SamplerChain(self.samplers, **self.numbers(CHAIN))
        check_chain(chain)
        chain = replace(chain, order=_effective_order(chain))
        is_plain = chain.order == PLAIN_ORDER and not chain.mirostat and not chain.dynatemp_range
        return None if is_plain else chain

    @property
    def dry_window(self) -> int | None:
        return self._window("dry_penalty_last_n")

    @property
    def penalty_window(self) -> int | None:
        return self._window("repeat_last_n") if "repeat_last_n" in self.own_names else None

    def _window(self, name: str) -> int | None:
        tokens: int = self.numbers((name,))[name]
        return None if tokens == -1 else tokens


@sampled(Dialect.OPENAI, without=("repeat_last_n",))
class AnswerFields(SamplerFields, AdapterFields, SpeculativeFields, SaltFields):
    stream: bool = False
    """True to send the answer as server-sent events."""
    seed: Annotated[SeedField, Requested()] = None
    """Seed of the random numbers. The same seed gives the same answer. The default, or -1, is a random seed."""


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


_FIELDS: Final = frozenset((*SAMPLING_TABLE, *SamplerFields.model_fields))


def chat_sampling(recommended: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values for sampling fields, from the cluster file, else the model file, else llama.cpp's defaults."""
    plain = {name: SAMPLING_TABLE[name].llamacpp for name in MAIN_NUMBERS}
    given = {CHAT.name(name): value for part in (recommended, defaults) for name, value in part.items()}
    return plain | {name: value for name, value in given.items() if name in _FIELDS and value is not None}
