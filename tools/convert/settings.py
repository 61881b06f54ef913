from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.tools.convert.lazy import Lazy

MAX_LAYERS: Final = 1 << 10
MAX_CONTEXT: Final = 1 << 30
MAX_WORDS: Final = 1 << 20
MAX_HEADS: Final = 1 << 14
MAX_CAP: Final = 1e6


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint. `family` is Hugging Face's class, such as LlamaForCausalLM, or "Meta" for other formats. `tensors`
    have their original names. `vocabulary` is the file or folder of the tokenizer."""

    family: str
    settings: Settings
    tensors: Mapping[str, Lazy]
    vocabulary: Path
    name: str
