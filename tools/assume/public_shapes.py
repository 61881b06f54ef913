"""Shapes of the catalog's models, by catalog name. `public_shapes.csv` holds data from published configurations."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llamaclust.tools.assume.shapes import SHAPES, ModelShape, Scalar

_TABLE: Final = Path(__file__).with_name("public_shapes.csv")
_LIKE: Final = {
    "gpt-oss-20b": ("gpt-oss-20b",),
    "gpt-oss-120b": ("gpt-oss-120b",),
    "glm-4.5-air": ("glm-4.5-air",),
    "qwen3-30b-a3b": (
        "qwen3-30b-a3b",
        "qwen3-30b-a3b-instruct-2507",
        "qwen3-coder-30b-a3b-instruct",
        "qwen3-vl-30b-a3b-instruct",
    ),
}
IN_CATALOG: Final = {"8b": "llama-3.1-8b-instruct", "70b": "llama-3.3-70b-instruct"}
_AS_LARGE: Final = {**IN_CATALOG, "7b": "mistral-7b-instruct-v0.3"}
_MIXTURES: Final = {
    "ernie-4.5-21b-a3b": ModelShape(
        architecture="ernie4_5-moe",
        title="ERNIE 4.5 21B-A3B",
        hidden=2560,
        layers=28,
        heads=20,
        kv_heads=4,
        vocabulary=103424,
        context=131072,
        ffn=12288,
        experts=64,
        used=6,
        expert_ffn=1536,
        shared_ffn=3072,
        leading_layers=1,
        rope_base=500000.0,
        is_tied=True,
        keys={
            "interleave_moe_layer_step": 1,
            "leading_dense_block_count": 1,
            "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 3072,
        },
    ),
    "ling-mini-2.0": ModelShape(
        architecture="bailingmoe2",
        title="Ling mini 2.0",
        hidden=2048,
        layers=20,
        heads=16,
        kv_heads=4,
        vocabulary=157184,
        context=32768,
        ffn=5120,
        experts=256,
        used=8,
        expert_ffn=512,
        shared_ffn=512,
        leading_layers=1,
        rope_base=600000.0,
        keys={
            "rope.dimension_count": 64,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 512,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_gating_func": 2,
            "expert_group_count": 8,
            "expert_group_used_count": 4,
        },
    ),
}
_LONG_CONTEXT: Final = 262144


@lru_cache(maxsize=1)
def public_shapes() -> Mapping[str, ModelShape]:
    shapes = dict(_MIXTURES)
    for shape, names in _LIKE.items():
        for name in names:
            known = SHAPES[shape]
            shapes[name] = known if name == shape else replace(known, context=_LONG_CONTEXT)
    with _TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shapes |= dict.fromkeys(row["name"].split(), _shape(row))
    return MappingProxyType(shapes)


def no_file_hint(name: str) -> str | None:
    """Returns advice about a model that only `plan --assume` knows, or None for other models."""
    plain = name.lower().partition(":")[0]
    if plain not in SHAPES or plain in _LIKE:
        return None
    of_catalog = f"; a model of that size is {_AS_LARGE[plain]}" if plain in _AS_LARGE else ""
    return (
        f"{plain}: only `plan --assume` knows this shape{of_catalog}; name a file on the hub as hf:OWNER/REPO/FILE.gguf"
    )


def _shape(row: Mapping[str, str]) -> ModelShape:
    keys = dict(entry.split("=") for entry in row["keys"].split())
    return ModelShape(
        architecture=row["architecture"],
        title=row["title"],
        rope_base=float(row["rope_base"]),
        is_tied=row["is_tied"] == "1",
        keys={name: _number(value) for name, value in keys.items()},
        hidden=int(row["hidden"]),
        layers=int(row["layers"]),
        heads=int(row["heads"]),
        kv_heads=int(row["kv_heads"]),
        head_dim=int(row["head_dim"]),
        ffn=int(row["ffn"]),
        vocabulary=int(row["vocabulary"]),
        context=int(row["context"]),
    )


def _number(text: str) -> Scalar:
    return float(text) if "." in text or not text.isdigit() else int(text)
