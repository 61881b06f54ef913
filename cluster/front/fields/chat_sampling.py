"""Sampling of a chat for which its user chose nothing, shared by the page and `llamaclust chat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llamaclust.cluster.front.fields.sampling import SamplerFields
from llamaclust.cluster.front.foreign_fields import CHAT
from llamaclust.core.sampling import MAIN_NUMBERS, SAMPLING_TABLE

_FIELDS: Final = frozenset((*SAMPLING_TABLE, *SamplerFields.model_fields))


def chat_sampling(recommended: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields of `/v1/chat/completions`: the cluster file's `defaults`, then what the model file recommends,
    then llama.cpp's own values."""
    plain = {name: SAMPLING_TABLE[name].llamacpp for name in MAIN_NUMBERS}
    given = {CHAT.name(name): value for part in (recommended, defaults) for name, value in part.items()}
    return plain | {name: value for name, value in given.items() if name in _FIELDS and value is not None}
