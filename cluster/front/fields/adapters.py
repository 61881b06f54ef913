"""The field `lora`, by which llama.cpp's clients choose adapters of LoRA."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llamaclust.cluster.front.schema import Body
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_ADAPTERS, AdapterScales


def read_scales(value: Any) -> AdapterScales:
    """[{"id": number, "scale": scale}, ...], in ascending order."""
    if not isinstance(value, list) or len(value) > MAX_ADAPTERS:
        raise ValueError(f"must be a list of {MAX_ADAPTERS} objects with 'id' and 'scale' at most")
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
    """With which adapters an answer is computed."""

    lora: Annotated[AdapterScales | None, BeforeValidator(read_scales), WithJsonSchema(SCALES_SCHEMA)] = None
    """[{"id": number, "scale": scale}, ...]: adapters by their numbers in `/lora-adapters`, others are not used.
    Without it, their scales are those of `POST /lora-adapters`."""
