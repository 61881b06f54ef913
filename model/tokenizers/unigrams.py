"""SentencePiece's other kind of vocabulary (`tokenizer.ggml.model` = t5): of all ways to write a text the one whose
pieces' scores have the greatest sum, after a normalization that the file brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.base import VocabularyTokenizer
from llamaclust.model.tokenizers.charsmap import check_charsmap
from llamaclust.model.tokenizers.sentence_pieces import SPACE, load_processor, model_proto
from llamaclust.model.tokenizers.vocabulary import TokenType, Vocabulary, key, read_flag

_CHARSMAP: Final = "precompiled_charsmap"


class UnigramTokenizer(VocabularyTokenizer):
    """The library finds user-defined words, too, as it does for the model's authors."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        super().__init__(
            vocabulary,
            add_bos=read_flag(metadata, "add_bos_token", False),
            add_eos=read_flag(metadata, "add_eos_token", True),
            add_space_prefix=read_flag(metadata, "add_space_prefix", False),
        )
        self._user_defined = []
        self._special = [(text, token_id) for text, token_id in self._special if self.is_control(token_id)]
        if not np.isfinite(vocabulary.scores or [0.0]).all():
            raise ModelFileError(f"{key('scores')}: holds what is no number")
        model = model_proto(vocabulary)
        model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
        model.normalizer_spec.add_dummy_prefix = self.add_space_prefix
        model.normalizer_spec.remove_extra_whitespaces = read_flag(metadata, "remove_extra_whitespaces", False)
        model.normalizer_spec.precompiled_charsmap = _charsmap(metadata)
        for piece in model.pieces:
            if piece.type == TokenType.USER_DEFINED:
                piece.piece = piece.piece.replace(" ", SPACE)
        self._processor = load_processor(model)

    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(text)
        return [token_id for token_id in ids if token_id < self.vocabulary_size]

    def word_bytes(self, word: str) -> bytes:
        return word.replace(SPACE, " ").encode()


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    """How characters are normalized. It is checked here: older versions of the library follow it without looking."""
    value = metadata.get(key(_CHARSMAP))
    if value is None:
        return b""
    if not isinstance(value, np.ndarray) or value.dtype.itemsize != 1 or value.dtype.kind not in "iu":
        raise ModelFileError(f"{key(_CHARSMAP)} is not an array of bytes")
    data = value.tobytes()
    check_charsmap(data, key(_CHARSMAP))
    return data
