"""tokenizer.bin of llama2.c: the words of LLaMA's SentencePiece with their scores."""

from __future__ import annotations

import re
from pathlib import Path
from struct import Struct
from typing import Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.vocabulary import TokenType
from llamaclust.tools.convert.vocabularies.words import Words

_ENTRY: Final = Struct("<fI")
_LONGEST: Final = 1 << 16
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
"""Files of 2023 hold the character of that number instead."""
_FIRST: Final = (("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL))
"""The file has its own spelling of these."""


def read_llama2c_words(path: Path, data: bytes) -> Words:
    """A number, then for each word its score, its length and its bytes."""
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
        raise ModelFileError(f"{path}: word {number} is not UTF-8: not a tokenizer.bin of llama2.c") from None
    byte = number - len(_FIRST)
    if _BYTE.fullmatch(text) or (byte < 256 and text == chr(byte)):
        return f"<0x{byte:02X}>" if len(text) == 1 else text, TokenType.BYTE
    return text.replace(" ", "▁"), TokenType.NORMAL


def _cut_short(path: Path, count: int) -> ModelFileError:
    return ModelFileError(f"{path}: ends in word {count}: cut short, or no tokenizer.bin of llama2.c")
