"""Records llama.cpp's embeddings of TEXTS by small models with random weights for each pooling, one little-endian file
each in data/embeddings, float32 [vectors, channels]. Run it again after a model or a text changes:

    pip install llama-cpp-python==0.3.36
    python tests/support/models/record_embeddings.py
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from llamaclust.model.pooling import Pooling
from support.models.tiny_architectures import build_architecture
from support.models.tiny_encoders import ENCODERS, build_encoder
from support.models.tiny_model import build_tiny_model
from support.paths import DATA

FOLDER = DATA / "embeddings"
TEXTS = (
    "the water of the people",
    "They were, at first, from one another!",
    "a",
    "no one could see how many of these would come down and find the long oil",
)
MODELS = (*ENCODERS, "llama", "qwen3", "gemma2", "gpt2")
POOLINGS = {Pooling.NONE: 0, Pooling.MEAN: 1, Pooling.CLS: 2, Pooling.LAST: 3}
"""Numbers of poolings in files and in llama.cpp."""


def build(folder: Path, name: str) -> Path:
    path = folder / f"{name}.gguf"
    if name == "llama":
        return build_tiny_model(path, layers=3, hidden=64, heads=4, ffn=96)
    return build_encoder(path, name) if name in ENCODERS else build_architecture(path, name)


def recorded_at(name: str, pooling: Pooling) -> Path:
    return FOLDER / f"{name}-{pooling}.f32"


def record(path: Path, pooling: Pooling) -> bytes:
    from llama_cpp import Llama

    float32 = 0
    llama = Llama(
        str(path), n_ctx=256, n_batch=256, n_ubatch=256, n_gpu_layers=0, embedding=True,
        pooling_type=POOLINGS[pooling], type_k=float32, type_v=float32, verbose=False,
    )  # fmt: skip
    vectors = [np.array(llama.embed(text, normalize=True), "<f4") for text in TEXTS]
    rows = np.concatenate([np.atleast_2d(vector) for vector in vectors])
    assert np.isfinite(rows).all() and rows.std() > 0
    return rows.tobytes()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, pooling in product(MODELS, POOLINGS):
            recorded_at(name, pooling).write_bytes(record(build(Path(folder), name), pooling))
            print(name, pooling)


if __name__ == "__main__":
    main()
