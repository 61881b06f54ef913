"""Shapes of models of the catalog (`public_shapes.csv`, from their published configurations), by their names there."""

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
"""Named shapes, and the models of the catalog that have them."""
_LONG_CONTEXT: Final = 262144


@lru_cache(maxsize=1)
def public_shapes() -> Mapping[str, ModelShape]:
    """By name of the catalog, without its quantization. Models of the catalog whose shape is not known are absent."""
    shapes = {}
    for shape, names in _LIKE.items():
        for name in names:
            known = SHAPES[shape]
            shapes[name] = known if name == shape else replace(known, context=_LONG_CONTEXT)
    with _TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shapes |= dict.fromkeys(row["name"].split(), _shape(row))
    return MappingProxyType(shapes)


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
