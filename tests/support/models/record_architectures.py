"""Records what llama.cpp computes for the models of `tiny_architectures`, two files each in data/architectures, little-
endian: NAME.f32, logits of TOKENS in one batch, float32 [24, 320]; NAME.decode.f16, every fourth logit of 40 steps of
one token after them, float16 [40, 80]. To be run again when a model is added or changed, its name as an argument (all
without one):

    pip install llama-cpp-python==0.3.36
    python tests/support/models/record_architectures.py NAME ...
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from support.models.tiny_architectures import (
    DECODED_STRIDE,
    DECODED_TOKENS,
    MODELS,
    TOKENS,
    VOCABULARY,
    build_architecture,
)
from support.paths import DATA

FOLDER = DATA / "architectures"


def record(path: Path, context: int) -> tuple[bytes, bytes]:
    """Logits of a prefill and of decode steps, keys and values in float32."""
    from llama_cpp import Llama

    float32 = 0
    llama = Llama(
        str(path), n_ctx=context, n_gpu_layers=0, logits_all=True, type_k=float32, type_v=float32, verbose=False
    )
    llama.eval(TOKENS)
    logits = np.array(llama.scores[: len(TOKENS)], "<f4")
    assert logits.shape == (len(TOKENS), VOCABULARY) and logits.std() > 0.1
    for token in DECODED_TOKENS:
        llama.eval([token])
    decoded = np.array(llama.scores[len(TOKENS) : len(TOKENS) + len(DECODED_TOKENS), ::DECODED_STRIDE], "<f2")
    assert np.isfinite(decoded).all() and decoded.std() > 0.1
    return logits.tobytes(), decoded.tobytes()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or MODELS:
            path = build_architecture(Path(folder) / f"{name}.gguf", name)
            logits, decoded = record(path, MODELS[name].context)
            (FOLDER / f"{name}.f32").write_bytes(logits)
            (FOLDER / f"{name}.decode.f16").write_bytes(decoded)
            print(name)


if __name__ == "__main__":
    main()
