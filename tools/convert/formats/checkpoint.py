"""A checkpoint after reading: settings, tensors by their original names, and the path of its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamaclust.tools.convert.lazy import Lazy
from llamaclust.tools.convert.settings import Settings


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`family` names the page that maps it: a class of Hugging Face's, or one of our own for other formats.

    `vocabulary` is the file or the folder that its tokenizer is read from.
    """

    family: str
    settings: Settings
    tensors: Mapping[str, Lazy]
    vocabulary: Path
    name: str
