"""SentencePiece's own files: pieces with scores and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llamaclust.errors import ModelFileError
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.vocabularies.words import Words

_PROTO: Any = sentencepiece_model_pb2
_PIECES_OF_GGUF: Final = {int(kind): kind for kind in TokenType}
"""GGUF's type numbers are SentencePiece's own."""


def read_sentence_piece(path: Path, data: bytes) -> Words:
    """ModelFileError where the file is damaged or has pieces that are not merged by score."""
    model = _PROTO.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelFileError(f"{path}: neither SentencePiece's nor a list of ranks: it may be cut short") from None
    if not model.pieces:
        raise ModelFileError(f"{path}: a SentencePiece model without pieces")
    if model.trainer_spec.model_type != _PROTO.TrainerSpec.BPE:
        kind = _PROTO.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise ModelFileError(f"{path}: a SentencePiece model of kind {kind}; only BPE is supported")
    words = Words(
        kind="llama",
        pre="default",
        origin=path,
        texts=[piece.piece for piece in model.pieces],
        types=[_PIECES_OF_GGUF[piece.type] for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
    )
    words.flags["add_space_prefix"] = model.normalizer_spec.add_dummy_prefix
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
