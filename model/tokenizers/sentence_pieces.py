"""SentencePiece vocabularies (`tokenizer.ggml.model` = llama for BPE, t5 for unigrams), as model protos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.tokenizer import CONTROL_TYPES, SpecialTokens, Tokenizer
from llamaclust.model.tokenizers.vocabulary import TokenType, Vocabulary, key, read_flag

_SPACE: Final = "▁"
_PROTO: Any = sentencepiece_model_pb2
_CHARSMAP: Final = key("precompiled_charsmap")
_LEAF_BIT: Final = 1 << 8
_VALUE_BIT: Final = 1 << 31
_BLOCK: Final = 256


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer that merges pieces by score (BPE), or finds the split with the greatest sum of scores (unigrams)."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any], *, is_unigram: bool = False) -> None:
        super().__init__(
            vocabulary,
            add_bos=read_flag(metadata, "add_bos_token", not is_unigram),
            add_eos=read_flag(metadata, "add_eos_token", is_unigram),
            add_space_prefix=read_flag(metadata, "add_space_prefix", not is_unigram),
        )
        self._prefix = " " if self.add_space_prefix and not is_unigram else ""
        model = _model_proto(vocabulary)
        if is_unigram:
            self._use_unigrams(model, vocabulary, metadata)
        self._processor = _processor(model)

    def _use_unigrams(self, model: Any, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        self._user_defined = SpecialTokens(vocabulary)
        self._special = SpecialTokens(vocabulary, *CONTROL_TYPES)
        if not np.isfinite(vocabulary.scores or [0.0]).all():
            raise ModelFileError(f"{key('scores')}: expected numbers only")
        model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
        model.normalizer_spec.add_dummy_prefix = self.add_space_prefix
        model.normalizer_spec.remove_extra_whitespaces = read_flag(metadata, "remove_extra_whitespaces", False)
        model.normalizer_spec.precompiled_charsmap = _charsmap(metadata)
        for piece in model.pieces:
            if piece.type == TokenType.USER_DEFINED:
                piece.piece = piece.piece.replace(" ", _SPACE)

    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(self._prefix + text if after_special else text)
        if ids and max(ids) >= self.vocabulary_size:
            return [token_id for token_id in ids if token_id < self.vocabulary_size]
        return ids

    def word_bytes(self, word: str) -> bytes:
        return word.replace(_SPACE, " ").encode()


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    """Returns the character map for normalization. Checks it here, because older versions of sentencepiece do not."""
    value = metadata.get(_CHARSMAP)
    if value is None:
        return b""
    if not isinstance(value, np.ndarray) or value.dtype.itemsize != 1 or value.dtype.kind not in "iu":
        raise ModelFileError(f"{_CHARSMAP} is not an array of bytes")
    data = value.tobytes()
    check_charsmap(data, _CHARSMAP)
    return data


def _processor(model: Any) -> Any:
    sentencepiece.set_min_log_level(2)  # Errors come as exceptions, so the log is not needed.
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.SerializeToString())
    except RuntimeError as error:
        raise ModelFileError(f"tokenizer.ggml: not a usable SentencePiece vocabulary: {error}") from error
    return processor


def _model_proto(vocabulary: Vocabulary) -> Any:
    """Returns a ModelProto for BPE by score. Appends a piece for unknown text if the vocabulary has none."""
    model = _PROTO.ModelProto()
    model.trainer_spec.model_type = _PROTO.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = vocabulary.types.count(TokenType.BYTE) == 256
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    first_unknown = vocabulary.types.find(TokenType.UNKNOWN)
    unknown = vocabulary.unknown_id if vocabulary.unknown_id is not None else first_unknown
    scores = vocabulary.scores or [0.0] * len(vocabulary)
    kinds, add = _piece_types(vocabulary, unknown, model.trainer_spec.byte_fallback), model.pieces.add
    for word, score, kind in zip(vocabulary.words, scores, kinds, strict=True):
        add(piece=word, score=score, type=kind)
    if unknown < 0:
        model.pieces.add(piece="\ufdd0unknown", score=0.0, type=TokenType.UNKNOWN)
    return model


def _piece_types(vocabulary: Vocabulary, unknown: int, byte_fallback: bool) -> bytes:
    """Returns each piece's type. All pieces of type UNKNOWN except `unknown` become control pieces."""
    changed = {TokenType.UNDEFINED: TokenType.UNUSED, TokenType.UNKNOWN: TokenType.CONTROL}
    if not byte_fallback:
        changed[TokenType.BYTE] = TokenType.CONTROL
    kinds = bytearray(vocabulary.types.translate(bytes.maketrans(bytes(changed), bytes(changed.values()))))
    if unknown >= 0:
        kinds[unknown] = TokenType.UNKNOWN
    return bytes(kinds)


def check_charsmap(data: bytes, origin: str) -> None:
    """Raises ModelFileError if SentencePiece's precompiled character map is too short, or if its trie points outside
    the map."""
    if not data:
        return
    length = int.from_bytes(data[:4], "little")
    if len(data) < 4 or length < 4 * _BLOCK or length % 4 or 4 + length >= len(data) or data[-1] != 0:
        raise ModelFileError(f"{origin}: a trie of {length} bytes and its texts do not fit in {len(data)} bytes")
    units = np.frombuffer(data, "<u4", length // 4, 4).astype(np.int64)
    inner = np.flatnonzero(units & _VALUE_BIT == 0)
    first = inner ^ _offsets(units[inner])
    if (first | (_BLOCK - 1)).max(initial=0) >= len(units):
        raise ModelFileError(f"{origin}: a branch of the trie leads outside the map")
    values = units[first[units[inner] & _LEAF_BIT != 0]] & (_VALUE_BIT - 1)
    if values.max(initial=0) >= len(data) - 4 - length:
        raise ModelFileError(f"{origin}: a leaf of the trie points outside the texts")


def _offsets(units: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns each trie unit's branch offset: its upper 22 bits, times 256 if bit 9 is set."""
    return (units >> 10) << ((units & (1 << 9)) >> 6)
