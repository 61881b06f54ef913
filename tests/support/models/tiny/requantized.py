"""Writes small models with every quantizable matrix in another type."""

from __future__ import annotations

from pathlib import Path

from llamaclust.model.gguf.model_file import open_model
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.quantize import plan_quantizing, write_quantized
from llamaclust.tools.quantize.type_choice import MixChoice


def requantized(path: Path, mix: str) -> Path:
    """Writes the model in the type `mix` beside the original."""
    out = path.with_name(f"{path.stem}.{mix}.gguf")
    job = plan_quantizing(open_model(path), MixChoice(MIXES[mix], pure=True), None, allow_requantize=True)
    write_quantized(job, out, 1, False, lambda *_: None)
    return out
