"""The field `speculative`: how many drafted tokens an answer may have in a step. It changes no token of it."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.api.schema import NOTHING_FOREIGN, Body, read_part
from llamaclust.cluster.scheduler.speculation.settings import MAX_WINDOW


class _Limits(Body):
    """llama.cpp's object. Its other fields choose between drafts, which the server does by itself."""

    n_max: int | None = None


def _most_drafted(value: Any, info: ValidationInfo) -> Any:
    """A number, or None for as many as the server likes."""
    if isinstance(value, bool):
        return None if value else 0
    if isinstance(value, dict):
        return read_part(_Limits, value, NOTHING_FOREIGN, info.context).n_max
    return value


_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": MAX_WINDOW}
_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [{"type": "boolean"}, _COUNT, {"type": "object", "properties": {"n_max": _COUNT}}]
}


class SpeculativeFields(Body):
    """Whether tokens are drafted."""

    speculative: Annotated[int | None, BeforeValidator(_most_drafted), WithJsonSchema(_SCHEMA)] = None
    """Drafted tokens in a step, at most, as a number or {"n_max": number}; false or 0: none; true, the default: as the
    cluster does. The answer is the same."""
