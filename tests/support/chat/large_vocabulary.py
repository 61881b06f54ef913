"""A vocabulary of made-up words as large as those of Gemma 3 and Qwen, and a small model with it."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

import numpy as np

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny_model import build_tiny_model
from support.models.tiny_tokenizers import sentencepiece

LARGE = 1 << 18
_SPECIAL_WORDS = 3 + 256  # <unk>, <s>, </s> and 256 byte tokens
_SYLLABLES = [first + second for first in "ptkbdgmnlrsfvzh" for second in ("a", "e", "i", "o", "u", "ai", "ou", "an")]


def large_vocabulary(count: int = LARGE) -> dict[str, WritableValue]:
    """Builds a SentencePiece vocabulary of `count` words that can write any text."""
    metadata = sentencepiece(320)
    known = metadata["tokenizer.ggml.tokens"]
    assert isinstance(known, list)
    parts = product(_SYLLABLES, _SYLLABLES, ["", *_SYLLABLES], ["", "▁"])
    made = (space + first + second + third for first, second, third, space in parts)
    words = [*dict.fromkeys([*known, *islice(made, count)])][:count]
    words += [f"[unused{number}]" for number in range(count - len(words))]
    scores = np.maximum(0, np.arange(count, dtype=np.float32) - _SPECIAL_WORDS)
    types = np.concatenate([np.array([2, 3, 3] + [6] * 256, np.int32), np.ones(count - _SPECIAL_WORDS, np.int32)])
    return metadata | {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": -scores,
        "tokenizer.ggml.token_type": types,
    }


def build_large_vocabulary_model(path: Path, count: int = LARGE) -> Path:
    """Writes a model of one layer with 32 channels: 17 MB, in about a second."""
    shape = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 64, "vocabulary": count}
    return build_tiny_model(path, **shape, tied=True, extra=large_vocabulary(count))  # type: ignore[arg-type]
