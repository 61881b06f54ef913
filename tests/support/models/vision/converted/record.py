"""Records projector files that llama.cpp's converter writes for the checkpoints of `cases`, with random weights, in
data/converted (NAME.gguf), and the rows of transformers for a tile, float32 [rows, channels], little-endian (NAME.f32).
Run it again after a case is added or changed, with its name as an argument (all without one), where the project and
PyTorch are installed. CONVERTER is `convert_hf_to_gguf.py` of llama.cpp, of the version in llama-cpp-python 0.3.36:

    pip install torch==2.13.0 transformers==5.23.0 sentencepiece
    CONVERTER=... PYTHONPATH=tests python -m support.models.vision.converted.record NAME ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from support.models.vision.converted.cases import (
    CASES,
    DEVIATION,
    FOLDER,
    MEAN,
    TEXT_WIDTH,
    VOCABULARY,
    Case,
)
from support.models.vision.converted.original_rows import rows_of
from support.models.vision.converted.published import publish

_TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}


def _config(case: Case) -> Any:
    kind = getattr(transformers, case.family).config_class
    parts = {"vision_config": case.vision, "text_config": _TEXT | case.text}
    usual = {name: getattr(kind(), name) for name in parts}
    types = {name: {} if part is None else {"model_type": part.model_type} for name, part in usual.items()}
    return kind(**{name: types[name] | keys for name, keys in parts.items()}, **case.keys)


def _draw(model: Any) -> None:
    """Draws weights that float16 represents: matrices of unit gain, norms near 1, and small biases."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            if weight.ndim > 1:
                value = noise * weight[0].numel() ** -0.5
            else:
                value = (0.2 * noise) if name.endswith("bias") else (1 + 0.2 * noise)
            weight.copy_(value.half().float())
        for name, limit in model.named_buffers():
            if name.endswith(("_min", "_max")):
                limit.fill_((-1.0 if name.endswith("_min") else 1.0) * round(1.0 + float(torch.rand(())), 2))


def _checkpoint(case: Case, folder: Path) -> Any:
    """Writes a checkpoint as the model's publisher does, and returns the model."""
    model = getattr(transformers, case.family)(_config(case)).float().eval()
    _draw(model)
    model.save_pretrained(folder)
    publish(case.family, folder)
    numbers = {"image_mean": MEAN, "image_std": DEVIATION} | case.processor
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    breaks = {"added_tokens": [{"id": 12, "content": "[IMG_BREAK]"}]}
    (folder / "tokenizer.json").write_text(json.dumps(breaks))
    (folder / "tokenizer_config.json").write_text("{}")
    return model


def _record(name: str, folder: Path) -> None:
    case = CASES[name]
    model = _checkpoint(case, folder)
    path = FOLDER / f"{name}.gguf"
    words = [sys.executable, os.environ["CONVERTER"], str(folder), "--mmproj", "--outtype", "f32"]
    subprocess.run([*words, "--outfile", str(path)], check=True)
    with torch.no_grad():
        rows = rows_of(case, model, case.random_tile())
    assert np.isfinite(rows).all() and rows.std() > 0.1, rows.std()
    (FOLDER / f"{name}.f32").write_bytes(rows.astype("<f4").tobytes())
    print(name, rows.shape, path.stat().st_size)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            _record(name, Path(folder))


if __name__ == "__main__":
    main()
