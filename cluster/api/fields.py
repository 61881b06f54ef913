"""Fields that come in several shapes, read into one: stop strings, prompts, messages' content, logit biases."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llamaclust.core.sampling_bounds import MAX_LOGIT_BIASES

Prompt = str | tuple[int, ...]

MAX_PROMPTS = 64

_TEXT_PART_KEYS = {"type", "text"}


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError("must be a string or a list of strings")
    return tuple(strings)


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt (text, token ids) or a list of them."""
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts in one request, at most {MAX_PROMPTS} are taken")
        return tuple(one_prompt(item) for item in value)
    return (one_prompt(value),)


def one_prompt(value: Any) -> Prompt:
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


def read_biases(value: Any) -> tuple[tuple[int, float], ...]:
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

StopField = Annotated[tuple[str, ...], BeforeValidator(read_stop), WithJsonSchema(_STRINGS)]
PromptsField = Annotated[tuple[Any, ...], BeforeValidator(read_prompts), WithJsonSchema(_PROMPTS)]
ContentField = Annotated[str, BeforeValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]
BiasField = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(read_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
