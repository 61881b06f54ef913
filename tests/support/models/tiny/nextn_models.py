"""Small models with an MTP head that has random weights or predicts every greedy token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.models.tiny_architectures import MODELS, build_tiny


def with_nextn(path: Path, name: str = "glm4moe") -> Path:
    """Writes one of MODELS with a random MTP head, which is hardly ever right."""
    tiny = MODELS[name]
    return build_tiny(path, replace(tiny, layers=tiny.layers + 1, nextn=1))


def with_right_nextn(path: Path, name: str = "glm4moe") -> Path:
    """Writes the model with an MTP head that is always right: layers add nothing, so that each token depends only on
    the preceding one, as in the head."""
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
