"""BPE vocabularies of text (`tokenizer.ggml.model` = gemma4). Words are spelled with ▁ instead of spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.byte_pairs import encode_with, merge_model
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.vocabulary import TokenType, Vocabulary, key, read_flag, read_strings

_SPACE: Final = "▁"
_LINES: Final = r"[^\n]+|\n+"


class SpacedBytePairTokenizer(Tokenizer):
    """A BPE tokenizer that merges pairs by rank, but never merges line breaks with other text. Prompts begin with BOS.
    The file's `add_bos_token` is ignored, because it is wrong in some early files."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        super().__init__(
            vocabulary,
            add_bos=True,
            add_eos=read_flag(metadata, "add_eos_token", False),
            add_space_prefix=False,
        )
        if (count := vocabulary.types.count(TokenType.BYTE)) != 256:
            raise ModelFileError(f"{key('token_type')}: expected 256 byte tokens, found {count}")
        model = merge_model(vocabulary, read_strings(metadata, "merges"), byte_fallback=True)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_LINES), behavior="isolated")

    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        return encode_with(self._tokenizer, text)

    def word_bytes(self, word: str) -> bytes:
        return word.replace(_SPACE, " ").encode()
