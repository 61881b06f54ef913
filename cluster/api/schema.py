"""Bodies of requests as classes: known fields of their own types alone, and errors that name the field.

Fields that come in several shapes are read into one: stop strings, prompts, messages' content, logit biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling_bounds import MAX_LOGIT_BIASES

_UNKNOWN = "unknown_field"
_MOST_OF_A_NAME = 200

MAX_PROMPTS = 64
_TEXT_PART_KEYS = {"type", "text"}

Prompt = str | tuple[int, ...]

Neutral = Callable[[Any], bool]
"""Whether a value of a field asks for nothing that is not done anyway."""


class Body(BaseModel):
    """A request's fields, by their own names and types only. Null is the same as absent."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, fields: Any) -> Any:
        """Ends at the first unknown field; pydantic would list them all, which takes seconds for a million."""
        known = cls.model_fields
        unknown = next((name for name in fields if name not in known), None) if isinstance(fields, dict) else None
        if unknown is not None:
            near = get_close_matches(str(unknown)[:_MOST_OF_A_NAME], list(known), 1)
            text = f"unknown field{f'; did you mean {near[0]!r}?' if near else ''}"
            raise PydanticCustomError(_UNKNOWN, "{text}", {"name": str(unknown), "text": text})
        return fields


AnyBody = TypeVar("AnyBody", bound=Body)


def read_fields(
    kind: type[AnyBody], fields: Mapping[str, Any], unsupported: Mapping[str, Neutral] | None = None
) -> AnyBody:
    """The body that the fields make. ParameterError for one that is wrong or asks for what is not supported.

    `unsupported` are fields that other servers have: dropped where neutral, else refused.
    """
    kept = {name: value for name, value in fields.items() if value is not None}
    for name, is_neutral in (unsupported or {}).items():
        if name in kept and not is_neutral(kept.pop(name)):
            raise ParameterError(name, "this server does not support it; leave it out")
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _first_error(error) from error


def _first_error(error: ValidationError) -> ParameterError:
    """An unknown field comes before others: it may be one of those that are missing, misspelt."""
    details = error.errors(include_url=False, include_input=False)
    first: Any = min(details, key=lambda detail: detail["type"] != _UNKNOWN)
    place: Sequence[str | int] = first["loc"]
    if first["type"] == _UNKNOWN:
        place = (*place, first["ctx"]["name"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] == _UNKNOWN:
        return ParameterError(name[:_MOST_OF_A_NAME], first["msg"])
    if first["type"] == "value_error":
        return ParameterError(name, str(first["ctx"]["error"]))
    reason = "is missing" if first["type"] == "missing" else first["msg"][:1].lower() + first["msg"][1:]
    return ParameterError(name, reason)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError("must be a string or a list of strings")
    return tuple(strings)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt (text, token ids) or a list of them."""
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts in one request, at most {MAX_PROMPTS} are taken")
        return tuple(_prompt(item) for item in value)
    return (_prompt(value),)


def _prompt(value: Any) -> Prompt:
    """A prompt of text or token ids. Raises ValueError."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(is_int(item) for item in value):
        return tuple(value)
    raise ValueError("must be a string, a list of token ids, or a list of those")


def _content(value: Any) -> str:
    """The text of a message; parts are put on lines of their own."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_part(part) for part in value)


def _part(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("a part must be an object with a 'type'")
    if part["type"] != "text":
        raise ValueError(f"parts of type {part['type'][:60]!r} are not supported, only 'text'")
    if not isinstance(part.get("text"), str) or part.keys() - _TEXT_PART_KEYS:
        raise ValueError("a text part has the fields 'type' and 'text' alone")
    return str(part["text"])


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """{"token id": bias}."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(value)} token ids, at most {MAX_LOGIT_BIASES} are taken")
    biases = {_token_id(token): _bias(bias) for token, bias in value.items()}
    return tuple(sorted(biases.items()))


def is_token_id(text: str) -> bool:
    """Whether text is a number that may be a token's."""
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
_PARTS = {"type": "array", "items": {"type": "object", "required": ["type", "text"]}}

StopField = Annotated[tuple[str, ...], BeforeValidator(_stop), WithJsonSchema(_STRINGS)]
PromptsField = Annotated[tuple[Any, ...], BeforeValidator(_prompts), WithJsonSchema(_PROMPTS)]
ContentField = Annotated[str, BeforeValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]
BiasField = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
