"""Bodies of requests as classes: known fields of their own types alone, and errors that name the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from llamaclust.core.errors import ParameterError

_UNKNOWN = "unknown_field"
_MOST_OF_A_NAME = 200

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
