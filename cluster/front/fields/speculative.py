"""The field `speculative`: how many drafted tokens an answer may have in a step. It changes no token of it."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.config.values import shown, switched
from llamaclust.cluster.front.schema import Body, Leniency
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW

_FORMS: Final = f'give true, false, a number of drafted tokens from 0 to {MAX_WINDOW}, or {{"n_max": such a number}}'


def _most_drafted(value: Any, info: ValidationInfo) -> int | None:
    """None: as many as the server likes. llama.cpp's other keys choose between drafts, which the server does by
    itself."""
    if isinstance(value, dict):
        for name in value.keys() - {"n_max"}:
            if not isinstance(info.context, Leniency):
                raise ValueError(f"{shown(name)} is no key that this server has; {_FORMS}")
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
    """Whether tokens are drafted."""

    speculative: Annotated[int | None, BeforeValidator(_most_drafted), WithJsonSchema(_SCHEMA)] = None
    """Drafted tokens in a step, at most, as a number or {"n_max": number}; false or 0: none; true, the default: as the
    cluster does. The answer is the same."""
