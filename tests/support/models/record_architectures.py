"""Records llama.cpp's logits of the models of `tiny_architectures` in data/architectures, three little-endian files
each: NAME.f32, logits of TOKENS in one batch, float32 [24, 320]; NAME.decode.f16, every fourth logit of 40 steps of
one token after them, float16 [40, 80]; NAME.q8_0.f16, every fourth logit of all these steps with matrices in Q8_0,
float16 [64, 80]. llama4-long.f16 has logits of a prompt that is longer than an attention chunk.
Run it again after a model is added or changed, with its name as an argument (all without one). LLAMA is the folder of
llama.cpp's sources with a build in it; the library of November 2026 gives the bits of llama-cpp-python 0.3.36, which
recorded the first models:

    g++ -std=c++17 -I LLAMA/include -I LLAMA/ggml/include tests/support/models/llama_cpp/record_logits.cpp \\
        -L LLAMA/build/bin -Wl,-rpath,LLAMA/build/bin -lllama -lggml-base -o record_logits
    RECORD_LOGITS=./record_logits python tests/support/models/record_architectures.py NAME ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from support.models.tiny.llama4 import LONG_LLAMA4, LONG_RECORDED, LONG_TOKENS
from support.models.tiny.requantized import requantized
from support.models.tiny_architectures import (
    DECODED_STRIDE,
    DECODED_TOKENS,
    MODELS,
    TOKENS,
    VOCABULARY,
    build_architecture,
    build_tiny,
)
from support.paths import DATA

FOLDER = DATA / "architectures"
LONG = "llama4-long"


def logits_of(path: Path, context: int) -> NDArray[np.float32]:
    """Returns logits of a prefill and of decode steps, with keys and values in float32."""
    command = [os.environ["RECORD_LOGITS"], str(path), str(context), str(len(TOKENS))]
    tokens = " ".join(map(str, (*TOKENS, *DECODED_TOKENS))).encode()
    answer = subprocess.run(command, input=tokens, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(answer, "<f4").reshape(len(TOKENS) + len(DECODED_TOKENS), VOCABULARY)


def record(path: Path, context: int) -> tuple[bytes, bytes, bytes]:
    """Returns logits of a prefill, of decode steps, and of both in Q8_0."""
    both = logits_of(path, context)
    logits, decoded = both[: len(TOKENS)], both[len(TOKENS) :, ::DECODED_STRIDE].astype("<f2")
    assert logits.std() > 0.1 and np.isfinite(decoded).all() and decoded.std() > 0.1
    quantized = logits_of(requantized(path, "Q8_0"), context)[:, ::DECODED_STRIDE].astype("<f2")
    return logits.tobytes(), decoded.tobytes(), quantized.tobytes()


def record_long(path: Path) -> bytes:
    """Returns every fourth logit of the last steps in float16; llama.cpp computes at most 2048 tokens in a batch."""
    command = [os.environ["RECORD_LOGITS"], str(path), str(LONG_LLAMA4.context), "2000"]
    tokens = " ".join(map(str, LONG_TOKENS)).encode()
    answer = subprocess.run(command, input=tokens, stdout=subprocess.PIPE, check=True).stdout
    logits = np.frombuffer(answer, "<f4").reshape(len(LONG_TOKENS), VOCABULARY)[LONG_RECORDED, ::DECODED_STRIDE]
    assert logits.std() > 0.1
    return logits.astype("<f2").tobytes()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if LONG in sys.argv[1:] or not sys.argv[1:]:
            logits = record_long(build_tiny(Path(folder) / "long.gguf", LONG_LLAMA4))
            (FOLDER / f"{LONG}.f16").write_bytes(logits)
        for name in [name for name in sys.argv[1:] or MODELS if name != LONG]:
            path = build_architecture(Path(folder) / f"{name}.gguf", name)
            for kind, content in zip(
                ("f32", "decode.f16", "q8_0.f16"), record(path, MODELS[name].context), strict=True
            ):
                (FOLDER / f"{name}.{kind}").write_bytes(content)
            print(name)


if __name__ == "__main__":
    main()
