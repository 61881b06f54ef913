"""Projector weights by transformers' names, and the files of recorded rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.gguf.model_file import open_model
from support.models.vision.tiny_projectors import DEVIATION, FFN, HEADS, MEAN, WIDTH, TinyProjector
from support.paths import DATA

FOLDER = DATA / "projectors"
Weights = Mapping[str, NDArray[np.float32]]
LAYER = {"num_hidden_layers": 0, "hidden_size": WIDTH, "intermediate_size": FFN, "num_attention_heads": HEADS}


def recorded_at(name: str) -> Path:
    return FOLDER / f"{name}.f32"


def read_weights(path: Path) -> Weights:
    return {name: np.frombuffer(t.read(), "<f4").reshape(t.shape) for name, t in open_model(path).tensors.items()}


def pixels(tile: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns normalized pixels [1, 3, height, width]."""
    scaled = (tile / 255 - np.array(MEAN)) / np.array(DEVIATION)
    return np.asarray(scaled.transpose(2, 0, 1)[None], np.float32)


def loaded(module: Any, weights: Mapping[str, NDArray[np.float32]]) -> Any:
    import torch

    module.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in weights.items()})
    return module.float().eval()


def renamed(weights: Weights, names: Mapping[str, str]) -> dict[str, NDArray[np.float32]]:
    """Returns the weights and biases of `names` (keys: names in the file, without suffix) under their new names."""
    ends = ("weight", "bias")
    return {
        f"{to}.{end}": weights[f"{of}.{end}"] for of, to in names.items() for end in ends if f"{of}.{end}" in weights
    }


def layer_names(tiny: TinyProjector, parts: Mapping[str, str], place: str) -> dict[str, str]:
    return {f"v.blk.{layer}.{of}": f"{place}.{layer}.{to}" for layer in range(tiny.layers) for of, to in parts.items()}
