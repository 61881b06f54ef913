"""Base classes of request bodies, as strict pydantic models, and types of fields that several APIs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from llamaclust.cluster.config.field_docs import DocumentedModel
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_LOGIT_BIASES

if TYPE_CHECKING:
    from llamaclust.cluster.front.images.urls import ImageRules

NOT_SUPPORTED = "this server does not support this field; remove the field"
_UNKNOWN = "unknown_field"
_MOST_OF_A_NAME = 200
_MOST_IGNORED = 16

MAX_PROMPTS = 64
_LARGEST_NUMBER = (1 << 64) - 1

_building = Lock()

Prompt = str | tuple[int, ...]


class PlacedError(ValueError):
    """An error in a part of a field. Its text begins with the place of the part, such as `[0]`."""


Neutral = Callable[[Any], bool]
"""A predicate that returns True for values of a field that have no effect."""


@dataclass(frozen=True, slots=True)
class ForeignFields:
    """Fields that other servers have and this endpoint does not implement."""

    refused: Mapping[str, Neutral] = field(default_factory=dict)  # Fields that would change the answer.
    hints: Mapping[str, Neutral] = field(default_factory=dict)  # Fields that may be ignored.
    other_names: Mapping[str, str] = field(default_factory=dict)  # Maps other names of fields to own names.

    def name(self, given: str) -> str:
        return self.other_names.get(given, given)


class BodyContext:
    """Validation context that refuses fields that have no effect. `images` is None if the model reads only text."""

    def __init__(self, images: ImageRules | None = None) -> None:
        self.images = images


def takes_images(context: object) -> bool:
    return isinstance(context, BodyContext) and context.images is not None


class LenientContext(BodyContext):
    """Validation context that accepts fields that have no effect here, and collects their names in `ignored`."""

    def __init__(self, images: ImageRules | None = None) -> None:
        super().__init__(images)
        self.ignored: list[str] = []

    def ignore(self, name: str) -> None:
        if len(self.ignored) < _MOST_IGNORED and name not in self.ignored:
            self.ignored.append(name)


class Body(DocumentedModel):
    """Base class of strictly typed request bodies. Unknown fields are an error, except with a `LenientContext`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
    takes_recommended: ClassVar[bool] = False
    """True if the sampling that the model file recommends replaces the endpoint's own defaults."""
    foreign: ClassVar[ForeignFields] = ForeignFields()

    def __init_subclass__(cls, foreign: ForeignFields | None = None, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.foreign = foreign or cls.foreign

    def check(self) -> None:
        """Raises ParameterError if fields contradict each other. Called when all fields are read."""

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, fields: Any, info: ValidationInfo) -> Any:
        """Drops null fields. Drops or refuses unknown fields: pydantic would take seconds for a million of them."""
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        known = cls.model_fields
        unknown = [name for name in fields if name not in known]
        for name in unknown:
            if not isinstance(info.context, LenientContext):
                raise _unknown_field(str(name), known)
            info.context.ignore(str(name))
        if unknown:
            fields = {name: value for name, value in fields.items() if name in known}
        return {name: _as_declared(known[name], value) for name, value in fields.items()}


def _unknown_field(name: str, known: Iterable[str]) -> PydanticCustomError:
    near = get_close_matches(name[:_MOST_OF_A_NAME], list(known), 1)
    text = f"unknown field{f'; did you mean {near[0]!r}?' if near else ''}"
    return PydanticCustomError(_UNKNOWN, "{text}", {"name": name, "text": text})


def _as_declared(field_info: FieldInfo, value: Any) -> Any:
    """Converts 5.0 to 5 for integer fields, and [] to {} for object fields, because PHP writes empty objects as []."""
    if type(value) is float and value.is_integer() and field_info.annotation in (int, int | None):
        return int(value)
    return {} if value == [] and _is_object(field_info) else value


def _is_object(field_info: FieldInfo) -> bool:
    shown = next((part.json_schema for part in field_info.metadata if isinstance(part, WithJsonSchema)), None)
    if shown is not None:
        return shown.get("type") == "object"
    kinds = get_args(field_info.annotation) or (field_info.annotation,)
    return get_origin(field_info.annotation) is dict or any(
        isinstance(kind, type) and issubclass(kind, Body) for kind in kinds
    )


AnyBody = TypeVar("AnyBody", bound=Body)


@cache
def parts_of(kind: type[Body]) -> dict[str, type[Body]]:
    """Returns the class of each field that is an object with sampling fields, such as Ollama's `options`."""
    kinds = ((name, each.annotation) for name, each in kind.model_fields.items())
    bodies = {name: part for name, part in kinds if isinstance(part, type) and issubclass(part, Body)}
    return {name: part for name, part in bodies.items() if part.takes_recommended}


def read_part(kind: type[AnyBody], value: Any, context: BodyContext | None) -> AnyBody:
    """Calls `read_fields`, and converts ParameterError to ValueError, the error of pydantic validators."""
    try:
        return read_fields(kind, value, context)
    except ParameterError as error:
        raise ValueError(str(error)) from error


def read_fields(
    kind: type[AnyBody],
    fields: Mapping[str, Any],
    context: BodyContext | None = None,
    idle: Mapping[str, Neutral] = MappingProxyType({}),
) -> AnyBody:
    """Makes a body from fields. Raises ParameterError if a field is invalid or not supported. The fields in `idle` have
    no effect because of the server's settings."""
    foreign, kept = kind.foreign, {name: value for name, value in fields.items() if value is not None}
    for name, is_neutral in {**foreign.refused, **foreign.hints, **idle}.items():
        if name in kept and not is_neutral(kept.pop(name)):
            if not isinstance(context, LenientContext) or name in foreign.refused:
                raise ParameterError(name, NOT_SUPPORTED)
            context.ignore(name)
    as_sent = {name: other for other, name in foreign.other_names.items() if other in kept and name not in kept}
    for other, name in foreign.other_names.items():
        if other in kept and kept.setdefault(name, kept[other]) != kept.pop(other):
            raise ParameterError(
                other, f"is another name of {name}, and the two values differ: leave out one of the two fields"
            )
    try:
        body = _built(kind).model_validate(kept, context=context)
    except ValidationError as error:
        raise _first_error(error, as_sent) from error
    body.check()
    return body


def _built(kind: type[AnyBody]) -> type[AnyBody]:
    """Builds the validator of a class at its first use, because building all validators takes long."""
    # Some versions of pydantic have no lock of their own for this.
    with _building:
        kind.model_rebuild()  # Does nothing if the validator is built.
    return kind


def _first_error(error: ValidationError, as_sent: Mapping[str, str]) -> ParameterError:
    """Returns the error to report. `as_sent` maps fields to the names under which the client sent them."""
    details = error.errors(include_url=False, include_input=False)
    # An unknown field comes first, because it may be a misspelt required field.
    return _parameter_error(min(details, key=lambda detail: detail["type"] != _UNKNOWN), as_sent)


def field_error(kind: type[Body], name: str, value: Any) -> ParameterError | None:
    """Returns the error in one field's value, or None. Ignores errors in other fields, such as missing fields."""
    try:
        _built(kind).model_validate({name: value})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        return next((_parameter_error(detail) for detail in details if detail["loc"][:1] == (name,)), None)
    return None


def _parameter_error(first: Any, as_sent: Mapping[str, str] = MappingProxyType({})) -> ParameterError:
    place: Sequence[str | int] = first["loc"]
    place = (*(as_sent.get(str(part), part) for part in place[:1]), *place[1:])
    if first["type"] == _UNKNOWN:
        place = (*place, first["ctx"]["name"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] == _UNKNOWN:
        return ParameterError(name[:_MOST_OF_A_NAME], first["msg"])
    if first["type"] == "value_error" and isinstance(first["ctx"]["error"], PlacedError):
        inner, _, reason = str(first["ctx"]["error"]).partition(": ")
        return ParameterError(name + inner, reason)
    if first["type"] == "value_error":
        return ParameterError(name, str(first["ctx"]["error"]))
    reason = "is missing" if first["type"] == "missing" else first["msg"][:1].lower() + first["msg"][1:]
    return ParameterError(name, reason)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _limit(value: Any) -> Any:
    return None if _without_end(value) in (-1, -2) else value


def _without_end(value: Any) -> Any:
    """Returns -1 (no limit) instead of a limit that no context reaches, because some clients send 2147483647."""
    return -1 if is_int(value) and MAX_CONTEXT_TOKENS < value <= _LARGEST_NUMBER else value


def _seed(value: Any) -> Any:
    return None if value == -1 and not isinstance(value, bool) else value


def strings(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(string, str) for string in given):
        raise ValueError("must be a string or a list of strings")
    return tuple(given)


def _stops(value: Any) -> tuple[str, ...]:
    """Reads stop strings without empty ones, which some clients send for none."""
    return tuple(filter(None, strings(value)))


def _dimensions(value: Any) -> Any:
    return None if value == 0 and is_int(value) else value


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts in one request; the limit is {MAX_PROMPTS}")
        return tuple(_prompt(item) for item in value)
    return (_prompt(value),)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return tuple(value)
    raise ValueError("must be one prompt (a string or a list of token ids) or a list of prompts")


def prompt_string(value: dict[str, Any]) -> str:
    """Reads llama.cpp's form of a multimodal prompt, {"prompt_string": text}. Raises ValueError if it has images."""
    text = value.get("prompt_string")
    if not isinstance(text, str) or value.get("multimodal_data") or value.keys() - {"prompt_string", "multimodal_data"}:
        raise ValueError("an object must have the text `prompt_string` and no other fields; images are not supported")
    return text


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(value)} token ids; the limit is {MAX_LOGIT_BIASES}")
    biases = {_token_id(token): _bias(bias) for token, bias in value.items()}
    return tuple(sorted(biases.items()))


def is_token_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _token_id(text: str) -> int:
    if not is_token_id(text):
        raise ValueError(f"{text[:60]!r} is not a token id")
    return int(text)


def _bias(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
        raise ValueError("a bias must be a number within -100..100")
    return float(value)


_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
_PROMPTS = {"anyOf": [{"type": "string"}, _IDS, {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}}]}

LimitField = Annotated[int | None, BeforeValidator(_limit), WithJsonSchema({"type": "integer", "minimum": -2})]
"""Maximum number of tokens of an answer. None (in JSON also -1 or -2) means as many as fit into the context."""
WholeLimitField = Annotated[int, BeforeValidator(_without_end), Field(ge=-2)]
"""Maximum number of tokens of an answer, for fields whose default is -1 instead of null."""
SeedField = Annotated[int | None, BeforeValidator(_seed), WithJsonSchema({"type": "integer"})]
"""A seed. None (in JSON also -1, as in llama.cpp) means a random seed."""
StopField = Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(_STRINGS)]
DimensionsField = Annotated[int | None, BeforeValidator(_dimensions), WithJsonSchema({"type": "integer", "minimum": 0})]
"""The number of dimensions of an embedding. None (in JSON also 0) means all."""
PromptsField = Annotated[tuple[Any, ...], BeforeValidator(_prompts), WithJsonSchema(_PROMPTS)]
BiasField = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
