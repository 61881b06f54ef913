"""SentencePiece vocabularies (`tokenizer.ggml.model` = llama): a model proto built from the fields of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.base import VocabularyTokenizer
from llamaclust.model.tokenizers.vocabulary import TokenType, Vocabulary, read_flag

SPACE: Final = "▁"
_PROTO: Any = sentencepiece_model_pb2
_PIECE_TYPES: Final = {
    TokenType.UNDEFINED: TokenType.UNUSED,
    TokenType.UNKNOWN: TokenType.CONTROL,
}
"""GGUF's type numbers are SentencePiece's own; only one unknown piece is allowed, so a second one never matches."""


class SentencePieceTokenizer(VocabularyTokenizer):
    """Merges by score, bytes for what is not in the vocabulary, no normalization of the text."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        super().__init__(
            vocabulary,
            add_bos=read_flag(metadata, "add_bos_token", True),
            add_eos=read_flag(metadata, "add_eos_token", False),
            add_space_prefix=read_flag(metadata, "add_space_prefix", True),
        )
        self._processor = load_processor(model_proto(vocabulary))

    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        prefix = " " if self.add_space_prefix and after_special else ""
        ids: list[int] = self._processor.EncodeAsIds(prefix + text)
        if ids and max(ids) >= self.vocabulary_size:
            return [token_id for token_id in ids if token_id < self.vocabulary_size]
        return ids

    def word_bytes(self, word: str) -> bytes:
        return word.replace(SPACE, " ").encode()


def load_processor(model: Any) -> Any:
    """The library's tokenizer of a ModelProto."""
    sentencepiece.set_min_log_level(2)  # what is wrong comes as an exception
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.SerializeToString())
    except RuntimeError as error:
        raise ModelFileError(f"tokenizer.ggml: not a usable SentencePiece vocabulary: {error}") from error
    return processor


def model_proto(vocabulary: Vocabulary) -> Any:
    """A ModelProto that merges by score, with the vocabulary's words in their order; a piece for unknown text stands
    behind them where the file names none."""
    model = _PROTO.ModelProto()
    model.trainer_spec.model_type = _PROTO.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = vocabulary.types.count(TokenType.BYTE) == 256
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    unknown = _unknown_id(vocabulary)
    scores = vocabulary.scores or [0.0] * len(vocabulary)
    for index, (word, score) in enumerate(zip(vocabulary.words, scores, strict=True)):
        kind = _piece_type(vocabulary, index, unknown, model.trainer_spec.byte_fallback)
        model.pieces.add(piece=word, score=score, type=kind)
    if unknown is None:
        model.pieces.add(piece="\ufdd0unknown", score=0.0, type=TokenType.UNKNOWN)
    return model


def _unknown_id(vocabulary: Vocabulary) -> int | None:
    if vocabulary.unknown_id is not None:
        return vocabulary.unknown_id
    found = vocabulary.types.find(TokenType.UNKNOWN)
    return found if found >= 0 else None


def _piece_type(vocabulary: Vocabulary, index: int, unknown: int | None, byte_fallback: bool) -> int:
    kind = TokenType(vocabulary.types[index])
    if index == unknown:
        return TokenType.UNKNOWN
    if kind == TokenType.BYTE and not byte_fallback:
        return TokenType.CONTROL
    return _PIECE_TYPES.get(kind, kind)
