"""Stand-ins for the models that llama.cpp's server tests download, for both servers alike: small encoders and an
adapter with random weights. Every other model is MODEL."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))

MODEL_FLAGS = ("--model", "--hf-file", "--hf-repo", "--model-url")
ROUTED = (
    "ggml-org/tinygemma3-GGUF:Q8_0",
    "ggml-org/test-model-stories260K:F32",
    "ggml-org/test-model-stories260K-infill:F32",
)
"""The models behind a server that is started without one; each is MODEL."""
_ADAPTER = "adapter"


def build_stand_ins(folder: Path, model: Path) -> None:
    """Writes those that are missing."""
    from support.models.tiny_adapter import build_adapter
    from support.models.tiny_encoders import RANK, build_encoder

    folder.mkdir(parents=True, exist_ok=True)
    build_encoder(folder / "bert-bge-small.gguf", "bert")
    build_encoder(folder / "jina-reranker-v1-tiny-en.gguf", "jina-bert-v2", pooling=RANK)
    build_adapter(folder / f"{_ADAPTER}.gguf", model)


def model_of(flags: Mapping[str, str]) -> Path | None:
    """The file for the model that a command line names; None where it names none, as a router's does."""
    if not any(flag in flags for flag in MODEL_FLAGS):
        return None
    stand_in = _stand_in(flags.get("--hf-file", "").partition("/")[0])
    return stand_in if stand_in.is_file() else _model()


def adapter() -> Path:
    """The file for every adapter."""
    return _stand_in(_ADAPTER)


def preset(folder: Path) -> Path:
    """llama-server's list of the routed models, written to a file."""
    path = folder / "router.ini"
    path.write_text("".join(f"[{name}]\nmodel = {_model()}\n\n" for name in ROUTED))
    return path


def routed_models() -> list[dict[str, str]]:
    """The same for a cluster file."""
    return [{"model": str(_model()), "name": name} for name in ROUTED]


def _stand_in(name: str) -> Path:
    return Path(os.environ["LLAMACLUST_SUITE_STAND_INS"]) / f"{name}.gguf"


def _model() -> Path:
    return Path(os.environ["LLAMACLUST_SUITE_MODEL"])
