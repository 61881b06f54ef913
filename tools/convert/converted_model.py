"""Collects the metadata and tensors of a GGUF file. Each function in `converters/` converts one architecture: it takes
tensors by their names in the checkpoint, checks their shapes, and stores them with GGUF's names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.gguf.values import shown
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.tools.convert.lazy import Lazy, gathered
from llamaclust.tools.convert.settings import MAX_HEADS, MAX_LAYERS, MAX_WORDS, Checkpoint

_NOT_NEEDED: Final = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|rope\.freqs)"
)
"""Matches names of tables and masks that are not converted, because settings determine their values."""


class ConvertedModel:
    """Metadata and tensors to write. `vocabulary_rules` names the architecture whose rules convert the vocabulary."""

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        self.settings = checkpoint.settings
        self.architecture = architecture
        self.metadata: dict[str, WritableValue] = {}
        self.tensors: dict[str, Lazy] = {}
        self.notes: list[str] = []
        self.vocabulary_rules = architecture
        self._left = dict(checkpoint.tensors)

    def key(self, name: str, value: WritableValue) -> None:
        self.metadata[f"{self.architecture}.{name}"] = value

    def has(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._left.get(name)
        return None if tensor is None else tensor.shape

    def take(self, name: str, *shape: int) -> Lazy:
        """Takes a tensor from the checkpoint. Raises ModelFileError if it is missing or of another shape."""
        tensor = self._taken(name, shape)
        if not tensor.storage.is_real:
            raise self._error(name, f"expected floating-point numbers, found {tensor.storage.name}")
        return tensor

    def take_bytes(self, name: str, *shape: int) -> Lazy:
        tensor = self._taken(name, shape)
        if tensor.storage is not Storage.U8:
            raise self._error(name, f"expected bytes, found {tensor.storage.name}")
        return tensor

    def _taken(self, name: str, shape: tuple[int, ...]) -> Lazy:
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise self._error(name, "missing")
        if tensor.shape != shape:
            raise self._error(name, f"expected shape {list(shape)}, found {list(tensor.shape)}")
        return tensor

    def put(self, name: str, tensor: Lazy) -> None:
        assert name not in self.tensors, name
        self.tensors[name] = tensor

    def copy(self, name: str, source: str, *shape: int, bias: bool | None = False) -> None:
        """Copies a module's weight, and its bias unless `bias` is False. If `bias` is None, the bias may be missing."""
        self.put(f"{name}.weight", self.take(f"{source}.weight", *shape))
        if bias or (bias is None and self.has(f"{source}.bias")):
            self.put(f"{name}.bias", self.take(f"{source}.bias", shape[0]))

    def leave(self, *prefixes: str) -> bool:
        """Drops all tensors whose names begin with one of `prefixes`. Returns False if there is no such tensor."""
        found = [name for name in self._left if name.startswith(prefixes)]
        for name in found:
            del self._left[name]
        return bool(found)

    def finish(self) -> None:
        left = [name for name in self._left if not _NOT_NEEDED.fullmatch(name)]
        if left:
            others = len(left) - 1
            more = "" if not others else ", nor is 1 other" if others == 1 else f", nor are {others} others"
            what = "the model has another architecture, or more layers than its configuration says"
            raise self._error(left[0], f"not a tensor of {self.architecture}{more}: {what}")

    def _error(self, name: str, what: str) -> ModelFileError:
        return ModelFileError(f"{self.settings.origin}: tensor {shown(name)}: {what}")

    @property
    def layers(self) -> int:
        return self.settings.count("num_hidden_layers", "n_layer", "num_layers", "n_layers", maximum=MAX_LAYERS)

    @property
    def width(self) -> int:
        return self.settings.count("hidden_size", "n_embd")

    @property
    def heads(self) -> int:
        return self.settings.count("num_attention_heads", "n_head", maximum=MAX_HEADS)

    @property
    def kv_heads(self) -> int:
        heads = self.heads
        found = self.settings.count("num_key_value_heads", default=heads, maximum=heads)
        if heads % found:
            raise self.settings.error("num_key_value_heads", f"{found} does not divide {heads} heads")
        return found

    @property
    def head_width(self) -> int:
        heads = self.heads
        if not self.settings.has("head_dim") and self.width % heads:
            raise self.settings.error("num_attention_heads", f"{heads} does not divide a width of {self.width}")
        return self.settings.count("head_dim", default=max(1, self.width // heads), maximum=1 << 12)

    @property
    def words(self) -> int:
        return self.settings.count("vocab_size", "padded_vocab_size", maximum=MAX_WORDS)

    def output(self, source: str = "lm_head", *, tied: bool = False) -> None:
        if self.settings.flag("tie_word_embeddings", default=tied) or not self.has(f"{source}.weight"):
            if not self.settings.flag("tie_word_embeddings", default=True):
                raise self._error(f"{source}.weight", "missing")
            self._left.pop(f"{source}.weight", None)
            return
        self.copy("output", source, self.words, self.width)


def neighbours(tensor: Lazy, heads: int) -> Lazy:
    """Permutes the rows of Q or K so that the two channels of each RoPE pair become neighbours."""
    width = tensor.shape[0] // heads
    order = np.arange(tensor.shape[0], dtype=np.int64).reshape(heads, 2, width // 2).swapaxes(1, 2)
    return gathered(tensor, order.reshape(-1))


def picked(tensor: Lazy, parts: Sequence[range]) -> Lazy:
    index = np.concatenate([np.arange(part.start, part.stop, dtype=np.int64) for part in parts])
    return gathered(tensor, index)
