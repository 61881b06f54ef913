"""Reads SentencePiece model files, and llama2.c's tokenizer.bin, which has LLaMA's SentencePiece pieces."""

from __future__ import annotations

import re
from pathlib import Path
from struct import Struct
from typing import Any, Final

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.sentence_pieces import check_charsmap
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.vocabularies.words import Words

_PROTO: Any = sentencepiece_model_pb2
_ENTRY: Final = Struct("<fI")
_LONGEST: Final = 1 << 16
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
"""Matches the text of a byte token, such as <0x0A>."""
_FIRST: Final = (("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL))


def read_sentence_piece(path: Path, data: bytes) -> Words:
    model = _PROTO.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelFileError(
            f"{path} is neither a SentencePiece model nor a tiktoken file; it may be cut short"
        ) from None
    if not model.pieces:
        raise ModelFileError(f"{path}: the SentencePiece model has no pieces")
    words = Words(
        kind=_kind(path, model),
        pre="default",
        origin=path,
        texts=[piece.piece for piece in model.pieces],
        types=[TokenType(piece.type) for piece in model.pieces],  # GGUF has SentencePiece's numbers.
        scores=[piece.score for piece in model.pieces],
    )
    words.flags["add_space_prefix"] = model.normalizer_spec.add_dummy_prefix
    if words.kind == "t5":
        _normalization(words, model)
    trainer = model.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unknown": trainer.unk_id, "padding": trainer.pad_id}
    words.ids |= {name: token_id for name, token_id in ids.items() if 0 <= token_id < len(words.texts)}
    return words


def _kind(path: Path, model: Any) -> str:
    kinds = {_PROTO.TrainerSpec.BPE: "llama", _PROTO.TrainerSpec.UNIGRAM: "t5"}
    found = kinds.get(model.trainer_spec.model_type)
    if found is None:
        name = _PROTO.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise ModelFileError(f"{path}: a SentencePiece model of kind {name} is not supported; supported: BPE, UNIGRAM")
    if found == "t5" and (
        model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces
    ):
        raise ModelFileError(f"{path}: a model that writes spaces after words, or not as ▁, is not supported")
    return found


def _normalization(words: Words, model: Any) -> None:
    words.flags |= {
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        "add_bos_token": 0 <= model.trainer_spec.bos_id < len(words.texts),
        "add_eos_token": False,
    }
    words.charsmap = model.normalizer_spec.precompiled_charsmap
    check_charsmap(words.charsmap, f"{words.origin}: its map of characters")


def read_llama2c_words(path: Path, data: bytes) -> Words:
    """Reads tokenizer.bin: four bytes that are not needed, and then the score, length and bytes of each word."""
    texts: list[str] = []
    types: list[TokenType] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise _cut_short(path, len(texts))
        score, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        if length > _LONGEST or at + length > len(data):
            raise _cut_short(path, len(texts))
        text, kind = _word(path, len(texts), data[at : at + length])
        at += length
        texts.append(text)
        types.append(kind)
        scores.append(score)
    if len(texts) < len(_FIRST):
        raise _cut_short(path, len(texts))
    words = Words(kind="llama", pre="default", origin=path, texts=texts, types=types, scores=scores)
    words.ids = {"unknown": 0, "bos": 1, "eos": 2}
    words.flags = {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    return words


def _word(path: Path, number: int, data: bytes) -> tuple[str, TokenType]:
    if number < len(_FIRST):
        return _FIRST[number]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ModelFileError(
            f"{path}: word {number} is not UTF-8, so this is not a tokenizer.bin of llama2.c"
        ) from None
    byte = number - len(_FIRST)
    if _BYTE.fullmatch(text) or (byte < 256 and text == chr(byte)):
        return f"<0x{byte:02X}>" if len(text) == 1 else text, TokenType.BYTE
    return text.replace(" ", "▁"), TokenType.NORMAL


def _cut_short(path: Path, count: int) -> ModelFileError:
    return ModelFileError(f"{path} ends in word {count}: it was cut short, or is not a tokenizer.bin of llama2.c")
