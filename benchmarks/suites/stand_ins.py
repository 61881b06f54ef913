"""Builds small models with random weights, for suites that test the form of replies but not their words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))

_FILL_IN = ("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id")
_RARE_TOKEN = 300


def build_stand_in(name: str, folder: Path) -> tuple[Path, Mapping[str, Any]]:
    return _BUILDERS[name](folder)


def _generating(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    from support.models.tiny_adapter import build_adapter
    from support.models.tiny_model import build_tiny_model

    tokens = {f"tokenizer.ggml.{key}": _RARE_TOKEN + i for i, key in enumerate(_FILL_IN)}
    model = build_tiny_model(folder / "generating.gguf", hidden=64, heads=4, layers=2, ffn=128, extra=tokens)
    adapter = build_adapter(folder / "adapter.gguf", model)
    (folder / "slots").mkdir()
    answers = {"max_tokens": 4, "temperature": 0}
    api = {"strict_model": False, "slot_folder": str(folder / "slots"), "defaults": answers}
    return model, {"context_length": 512, "api": api, "adapters": [{"name": "adapter", "path": str(adapter)}]}


def _ranking(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    from support.models.tiny_encoders import RANK, build_encoder

    model = folder / "ranking.gguf"
    build_encoder(model, "jina-bert-v2", pooling=RANK)
    return model, {}


def _seeing(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    from support.models.tiny_model import build_tiny_model
    from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

    model = build_tiny_model(folder / "seeing.gguf", hidden=TEXT_WIDTH, heads=4, layers=2, ffn=128, context=4096)
    build_projector(folder / "mmproj-seeing.gguf", "idefics3")
    answers = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return model, {"context_length": 4096, "api": {"strict_model": False, "defaults": answers}}


_BUILDERS: Mapping[str, Callable[[Path], tuple[Path, Mapping[str, Any]]]] = {
    "generating": _generating,
    "ranking": _ranking,
    "seeing": _seeing,
}
