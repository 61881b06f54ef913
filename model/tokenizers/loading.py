from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.vocabulary import read_vocabulary


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    from llamaclust.model.tokenizers.byte_pairs import BytePairTokenizer
    from llamaclust.model.tokenizers.sentence_pieces import SentencePieceTokenizer
    from llamaclust.model.tokenizers.spaced_byte_pairs import SpacedBytePairTokenizer
    from llamaclust.model.tokenizers.word_pieces import WordPieceTokenizer

    kinds: dict[str, Callable[..., Tokenizer]] = {
        "llama": SentencePieceTokenizer,
        "gpt2": BytePairTokenizer,
        "t5": partial(SentencePieceTokenizer, is_unigram=True),
        "bert": WordPieceTokenizer,
        "gemma4": SpacedBytePairTokenizer,
    }
    name = metadata.get("tokenizer.ggml.model")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        found = "no tokenizer" if name is None else f"a tokenizer of kind {ascii(name)[:66]}"
        raise ModelFileError(f"tokenizer.ggml.model: the file has {found}; supported kinds are {', '.join(kinds)}")
    return kind(read_vocabulary(metadata), metadata)
