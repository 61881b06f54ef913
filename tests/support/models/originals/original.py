"""Describes a small model of transformers: its class and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.models.tiny_architectures import VOCABULARY


@dataclass(frozen=True, slots=True)
class Original:
    """A class of transformers and the arguments of its configuration. `context`: the model's tokens in tests. `packed`:
    experts in MXFP4, which transformers reads but does not write."""

    family: str
    keys: Mapping[str, Any]
    context: int = 256
    packed: bool = False


def keys(**more: Any) -> dict[str, Any]:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return common | more


def without(keys: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in keys.items() if name not in names}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}}
