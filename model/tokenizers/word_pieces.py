"""WordPiece vocabularies (`tokenizer.ggml.model` = bert). A word is split into the longest pieces that fit."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.vocabulary import Vocabulary, key, read_flag, read_token_id

_BEGIN: Final = "▁"
_CLS, _SEP, _UNKNOWN = 101, 102, 100
_LONGEST_WORD: Final = 256
"""Prompts are assumed to have at most this number of characters per token on average. Only unusual text has more."""
_MOST_CHARACTERS: Final = 1 << 18
"""The maximum length of a text. Python takes about 25 microseconds for each character of a long word."""
_HAN: Final = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPieceTokenizer(Tokenizer):
    """A WordPiece tokenizer. It lowercases text and strips accents, unless the file forbids this. A word becomes one
    unknown token if pieces cannot spell it."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        size = len(vocabulary)
        begin = _named(metadata, ("bos_token_id", "cls_token_id"), size, _CLS)
        end = _named(metadata, ("seperator_token_id", "eos_token_id"), size, _SEP)  # GGUF misspells the key.
        super().__init__(
            replace(vocabulary, bos_id=begin, eos_id=end),
            add_bos=read_flag(metadata, "add_bos_token", True),
            add_eos=read_flag(metadata, "add_eos_token", True),
            add_space_prefix=True,
        )
        self._unknown = _named(metadata, ("unknown_token_id",), size, _UNKNOWN)
        self._longest_piece = max(map(len, vocabulary.words))
        self.longest_word = _LONGEST_WORD
        self._lowers = read_flag(metadata, "normalizer.lowercase", True)
        self._strips = read_flag(metadata, "normalizer.strip_accents", self._lowers)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        if len(text) > _MOST_CHARACTERS:
            raise RequestError(f"the text has {len(text)} characters; the limit is {_MOST_CHARACTERS}: shorten it")
        return super().encode(text, add_special, parse_special)

    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        return [token for word in self._words(text) for token in self._pieces(_BEGIN + word)]

    def word_bytes(self, word: str) -> bytes:
        return word.replace(_BEGIN, " ").encode()

    def _words(self, text: str) -> Iterator[str]:
        word: list[str] = []
        for character in unicodedata.normalize("NFD", text) if self._strips else text:
            kind = unicodedata.category(character)
            is_space = character.isspace()
            if is_space or _stands_alone(character, kind):
                if word:
                    yield "".join(word)
                    word.clear()
                if not is_space:
                    yield self._lower(character)
            elif not (kind.startswith("C") or character in "\0\ufffd" or (self._strips and kind == "Mn")):
                word.append(self._lower(character))
        if word:
            yield "".join(word)

    def _lower(self, character: str) -> str:
        lower = character.lower() if self._lowers else character
        return lower if len(lower) == 1 else character

    def _pieces(self, word: str) -> list[int]:
        ids, found, at = self.vocabulary.ids, list[int](), 0
        while at < len(word):
            ends = range(min(len(word), at + self._longest_piece), at, -1)
            end = next((end for end in ends if word[at:end] in ids), None)
            if end is None:
                return [self._unknown]
            found.append(ids[word[at:end]])
            at = end
        return found


def _stands_alone(character: str, kind: str) -> bool:
    code = ord(character)
    is_mark = kind.startswith("P") or (kind.startswith("S") and code < 0x7F)
    return is_mark or any(first <= code <= last for first, last in _HAN)


def _named(metadata: Mapping[str, Any], names: tuple[str, ...], size: int, default: int) -> int:
    for name in names:
        if (found := read_token_id(metadata, name, size)) is not None:
            return found
    if default >= size:
        raise ModelFileError(f"{key(names[0])} is missing, and the vocabulary of {size} words has no token {default}")
    return default
