"""Byte-level BPE vocabularies (`tokenizer.ggml.model` = gpt2). In words, each letter stands for one byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import tokenizers
from tokenizers import models, pre_tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.pre_tokenizers import PreTokenizer, pre_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.vocabulary import TokenType, Vocabulary, key, read_flag, read_strings

_HOLDING_CHARACTERS: Final = 2048
"""The maximum length of a text for `encode` of the `tokenizers` library, which holds the GIL. Longer texts are encoded
as a batch, which releases the GIL."""

_NEVER_FROM_TEXT: Final = frozenset({TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED})


def stand_ins() -> dict[str, bytes]:
    """Maps each letter of GPT-2's vocabulary to the byte for which it stands. Printable Latin-1 letters stand for their
    own bytes. Letters from U+0100 stand for the other bytes, such as the space."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(chr(byte), byte) for byte in printable] + [(chr(256 + i), byte) for i, byte in enumerate(others)]
    return {character: bytes([byte]) for character, byte in pairs}


_BYTE_OF: Final = stand_ins()
_LATIN_1: Final = dict.fromkeys(range(0x80, 0x100), "\uffff") | {
    ord(letter): byte.decode("latin-1") for letter, byte in _BYTE_OF.items()
}
"""Maps letters to the bytes for which they stand, as Latin-1. Others become U+FFFF, so that encoding fails."""


class BytePairTokenizer(Tokenizer):
    """A BPE tokenizer. It merges pairs by rank within the words into which the pre-tokenizer splits a text."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        name = metadata.get(key("pre"), "default")
        kind = pre_tokenizer(str(name))
        super().__init__(
            vocabulary,
            add_bos=read_flag(metadata, "add_bos_token", kind.add_bos),
            add_eos=read_flag(metadata, "add_eos_token", False),
            add_space_prefix=False,
        )
        model = merge_model(vocabulary, read_strings(metadata, "merges"), ignore_merges=kind.ignore_merges)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = splitter(kind)

    def encode_plain(self, text: str, after_special: bool) -> list[int]:
        return encode_with(self._tokenizer, text)

    def word_bytes(self, word: str) -> bytes:
        try:
            return word.translate(_LATIN_1).encode("latin-1")
        except UnicodeEncodeError:  # The word has letters that do not represent bytes.
            return b"".join(_BYTE_OF.get(character) or character.encode() for character in word)


def encode_with(tokenizer: Any, text: str) -> list[int]:
    if len(text) > _HOLDING_CHARACTERS:
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    else:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


def splitter(kind: PreTokenizer) -> Any:
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated") for regex in kind.expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def merge_model(vocabulary: Vocabulary, merges: list[str], **options: bool) -> models.BPE:
    """Returns a BPE model of the `tokenizers` library. Omits control tokens, so that text cannot become one. Also
    omits merges whose words are missing."""
    types = vocabulary.types
    words = {word: i for i, word in enumerate(vocabulary.words) if types[i] not in _NEVER_FROM_TEXT}
    return models.BPE(vocab=words, merges=_known_pairs(merges, words), **options)


def _known_pairs(merges: list[str], words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Returns the merges as pairs. Omits pairs with words outside the vocabulary, because the library would panic."""
    known: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left in words and right in words and left + right in words:
            known.append((left, right))
        elif not (left and right):
            raise ModelFileError(f"{key('merges')}: {ascii(merge)[:66]} is not two words separated by a space")
    return known
