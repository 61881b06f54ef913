"""SentencePiece's own files: pieces with scores and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.charsmap import check_charsmap
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.vocabularies.words import Words

_PROTO: Any = sentencepiece_model_pb2
_PIECES_OF_GGUF: Final = {int(kind): kind for kind in TokenType}
"""GGUF's type numbers are SentencePiece's own."""


def read_sentence_piece(path: Path, data: bytes) -> Words:
    """ModelFileError where the file is damaged, or of a kind that files have no word for."""
    model = _PROTO.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelFileError(f"{path}: neither SentencePiece's nor a list of ranks: it may be cut short") from None
    if not model.pieces:
        raise ModelFileError(f"{path}: a SentencePiece model without pieces")
    words = Words(
        kind=_kind(path, model),
        pre="default",
        origin=path,
        texts=[piece.piece for piece in model.pieces],
        types=[_PIECES_OF_GGUF[piece.type] for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
    )
    words.flags["add_space_prefix"] = model.normalizer_spec.add_dummy_prefix
    if words.kind == "t5":
        _normalization(words, model)
    said = model.trainer_spec
    for name, token_id in (
        ("bos", said.bos_id),
        ("eos", said.eos_id),
        ("unknown", said.unk_id),
        ("padding", said.pad_id),
    ):
        if 0 <= token_id < len(words.texts):
            words.ids[name] = token_id
    return words


def _kind(path: Path, model: Any) -> str:
    """GGUF's word for how pieces are chosen."""
    kinds = {_PROTO.TrainerSpec.BPE: "llama", _PROTO.TrainerSpec.UNIGRAM: "t5"}
    found = kinds.get(model.trainer_spec.model_type)
    if found is None:
        name = _PROTO.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise ModelFileError(f"{path}: a SentencePiece model of kind {name}; only BPE and UNIGRAM are supported")
    if found == "t5" and (
        model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces
    ):
        raise ModelFileError(f"{path}: spaces that do not stand before words as ▁ are not supported")
    return found


def _normalization(words: Words, model: Any) -> None:
    """What BPE files of this family do without. BOS and EOS are added where the files beside say so."""
    words.flags |= {
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        "add_bos_token": 0 <= model.trainer_spec.bos_id < len(words.texts),
        "add_eos_token": False,
    }
    words.charsmap = model.normalizer_spec.precompiled_charsmap
    check_charsmap(words.charsmap, f"{words.origin}: its map of characters")
