"""Small models with random weights, which replace the models that llama.cpp's server tests download. One model has an
adapter whose scale changes its answers. Tests of all other models use MODEL."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))

MODEL_FLAGS = ("--model", "--hf-file", "--hf-repo", "--model-url")
ROUTED = {
    "ggml-org/tinygemma3-GGUF:Q8_0": "",
    "ggml-org/test-model-stories260K:F32": "routed-1",
    "ggml-org/test-model-stories260K-infill:F32": "routed-2",
}
"""Models that tests of the router name, and the small models that replace them. An empty name stands for MODEL."""
_ADAPTED, _ADAPTER = "adapted", "adapter"
_FILL_IN = ("ggml-org/test-model-stories260K-infill", "fill-in")
"""The repository of a model with tokens for `/infill`, and the name of the small model that replaces it."""
_SEEING = ("ggml-org/tinygemma3-GGUF", "seeing")
"""The repository of a model with a projector, and the name of the folder whose two files replace them."""


def build_stand_ins(folder: Path) -> None:
    from support.arithmetic.scale_words import build_scale_words
    from support.models.tiny_encoders import RANK, build_encoder
    from support.models.tiny_model import build_tiny_model
    from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

    folder.mkdir(parents=True, exist_ok=True)
    build_encoder(folder / "bert-bge-small.gguf", "bert")
    build_encoder(folder / "jina-reranker-v1-tiny-en.gguf", "jina-bert-v2", pooling=RANK)
    build_scale_words(folder / f"{_ADAPTED}.gguf", folder / f"{_ADAPTER}.gguf")
    fill_in = {f"tokenizer.ggml.fim_{part}_token_id": number for number, part in enumerate(("pre", "suf", "mid"), 40)}
    build_tiny_model(folder / f"{_FILL_IN[1]}.gguf", extra=fill_in)
    seeing = folder / _SEEING[1]
    seeing.mkdir()
    build_tiny_model(seeing / "model.gguf", hidden=TEXT_WIDTH, heads=4)
    build_projector(seeing / "mmproj.gguf", "gemma3")
    for seed, name in enumerate(filter(None, ROUTED.values())):
        build_tiny_model(folder / f"{name}.gguf", seed=seed)


def model_of(flags: Mapping[str, str]) -> Path | None:
    if not any(flag in flags for flag in MODEL_FLAGS):
        return None
    if "--lora" in flags:
        return _stand_in(_ADAPTED)
    if flags.get("--hf-repo", "").partition(":")[0] == _SEEING[0]:
        return _stand_in(f"{_SEEING[1]}/model")
    repository, name = _FILL_IN
    is_fill_in = flags.get("--hf-repo") == repository
    stand_in = _stand_in(name if is_fill_in else flags.get("--hf-file", "").partition("/")[0])
    return stand_in if stand_in.is_file() else _model()


def projector_of(model: Path) -> Path | None:
    path = model.with_name("mmproj.gguf")
    return path if path.is_file() else None


def adapter() -> Path:
    return _stand_in(_ADAPTER)


def routed_models() -> dict[str, Path]:
    return {name: _stand_in(file) if file else _model() for name, file in ROUTED.items()}


def preset(folder: Path) -> Path:
    path = folder / "router.ini"
    path.write_text("".join(f"[{name}]\nmodel = {model}\n\n" for name, model in routed_models().items()))
    return path


def _stand_in(name: str) -> Path:
    return Path(os.environ["LLAMACLUST_SUITE_STAND_INS"]) / f"{name}.gguf"


def _model() -> Path:
    return Path(os.environ["LLAMACLUST_SUITE_MODEL"])
