"""The name and limits of a served model, and the settings from its file that text requests need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llamaclust.cluster.planner.context import ContextBounds, ContextChoice
from llamaclust.cluster.state.adapters import ServedAdapters
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.pooling import DEFAULT, Pooling
from llamaclust.model.ranking import Ranking


@dataclass(frozen=True, slots=True)
class TextSettings:
    """Name and limits of a served model, and settings from its file."""

    model_name: str
    context_length: int  # Maximum number of tokens of a sequence, prompt and answer together.
    max_sequences: int = 32
    model_path: str = ""  # Path of the model file, or empty if there is none.
    file: ModelFile | None = None  # None if there is no model file.
    embedding_length: int = 0  # Number of channels of an embedding.
    pooling: Pooling = DEFAULT  # Pooling of embeddings if a request names none.
    ranking: Ranking | None = None  # None if the model does not rank documents.
    generates: bool = True
    slots: int = 0  # Number of slots that record the tokens of requests.
    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    max_drafted: int = 0  # Maximum number of tokens drafted for a sequence in a step. 0: no drafting.
    recommended: Mapping[str, Any] = field(default_factory=dict)  # Sampling fields that the model file recommends.
    context_bounds: ContextBounds | None = None  # Bounds of the context length. None: it is the model's own.

    @property
    def context(self) -> ContextChoice:
        return ContextChoice(self.context_length, self.context_bounds or ContextBounds.fixed(self.context_length))
