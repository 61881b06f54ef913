"""Small models with an MTP head: random, or right about all that is chosen greedily."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.models.tiny_architectures import MODELS, build_tiny


def with_nextn(path: Path, name: str = "glm4moe") -> Path:
    """One of MODELS with a layer more, which is a head. Its weights are random, so it is hardly ever right."""
    tiny = MODELS[name]
    return build_tiny(path, replace(tiny, layers=tiny.layers + 1, nextn=1))


def with_right_nextn(path: Path, name: str = "glm4moe") -> Path:
    """The same, but for layers that add nothing: each token follows from the one before it alone, and the head, which
    hands on the token behind its row, says the same."""
    with Model.open(with_nextn(path.with_suffix(".random.gguf"), name)) as model:
        sources = [_knowing(model, tensor) for tensor in model.file.tensors]
        write_gguf(path, dict(model.file.metadata), sources)
    return path


def _knowing(model: Model, name: str) -> TensorSource:
    tensor = model.file.tensor(name)
    values = np.frombuffer(tensor.read(), np.float32).reshape(tensor.shape).copy()
    if any(part in name for part in ("attn_output", "ffn_down", "ssm_out")):
        values[:] = 0
    if name.endswith("eh_proj.weight"):
        values[:] = np.eye(values.shape[0], values.shape[1])
    if name.endswith(("enorm.weight", "shared_head_norm.weight", "output_norm.weight")):
        values[:] = 1
    return TensorSource(name, QuantType.F32, tensor.shape, values.tobytes)
