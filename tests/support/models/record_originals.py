"""Records transformers' results for the models of `original_models` in data/originals: configuration and tensor shapes
(NAME.json), and the logits of TOKENS, float16 [24, 320], little-endian (NAME.f16). Weights are not recorded: they are
drawn from the tensors' names. Run it again after a model is added or changed, with its name as an argument (all without
one), where the project and PyTorch are installed:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/support/models/record_originals.py NAME ...
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.models.original_models import DATA_FOLDER, MODELS, SEED, Shapes, packed_form, write_original
from support.models.originals.original import Original
from support.models.tiny_architectures import TOKENS, VOCABULARY


def saved_form(original: Original, folder: Path) -> tuple[dict[str, Any], Shapes]:
    """Returns the configuration and tensor shapes that transformers saves."""
    import transformers

    family = getattr(transformers, original.family)
    family(family.config_class(**original.keys)).save_pretrained(folder)
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    config = json.loads((folder / "config.json").read_text())
    return packed_form(config, shapes) if original.packed else (config, shapes)


def original_logits(original: Original, folder: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Returns float32 logits [tokens, vocabulary]; asserts that transformers uses every tensor."""
    import torch
    import transformers

    family = getattr(transformers, original.family)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = family.from_pretrained(folder, **options)
    assert not any(info.values()), info
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.tensor([list(tokens)])).logits[0].numpy()
    assert logits.shape == (len(tokens), VOCABULARY) and logits.std() > 0.3, logits.std()
    return logits


def main() -> None:
    DATA_FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as place:
            config, shapes = saved_form(MODELS[name], Path(place) / "saved")
            folder = write_original(Path(place) / "drawn", config, shapes, SEED)
            logits = original_logits(MODELS[name], folder, TOKENS)
        (DATA_FOLDER / f"{name}.json").write_text(json.dumps({"config": config, "tensors": shapes}) + "\n")
        (DATA_FOLDER / f"{name}.f16").write_bytes(logits.astype("<f2").tobytes())
        print(name, f"{logits.std():.2f}")


if __name__ == "__main__":
    main()
