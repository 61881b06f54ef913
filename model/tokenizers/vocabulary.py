"""The vocabulary of a GGUF file: words with their types and scores, and the tokens with a special role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.fill_in import FillInTokens, find_fill_in

_END_TEXTS: Final = (
    "</s> <EOT> <REPO> <eos> <end_of_turn> <end_of_utterance> <fim-pad> <fim_pad> <fim-repo> <reponame> <turn|> "
    "<|call|> <|calls|> <|end_of_text|> <|endoftext|> <|end|> <|eom_id|> <|eot_id|> <|file_sep|> <|fim_pad|> "
    "<|fim_repo|> <|flush|> <|im_end|> <|repo_name|> <|return|> <|tool_response> <｜end▁of▁sentence｜> [EOS] [EOT] "
    "[e~[ _<EOT>"
)
END_OF_GENERATION_TEXTS: Final = frozenset(_END_TEXTS.split())

_PADDING_TEXTS: Final = frozenset({"<PAD>", "[PAD]"})
_PLAIN_TEXTS: Final = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
GEMMA4_VISIBLE: Final = frozenset(
    {
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", '<|"|>'),
    }
)
"""Tokens of Gemma 4 that are user-defined instead of control, because the answer parser needs their text."""
_MARK_TEXTS: Final = _PLAIN_TEXTS | GEMMA4_VISIBLE | {"<|end|>"}
_STRIPPING_NAMES: Final = ("phi-3", "phi3")
_NOT_STRIPPING_TEXTS: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_BYTE_TEXT: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SUPPRESSED: Final = "suppress_tokens"
_MAX_SUPPRESSED: Final = 256
_MAX_WORD_CHARS: Final = 4096
_END_KEYS: Final = tuple(f"{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))


class TokenType(IntEnum):
    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary. `marks` are user-defined tokens that separate the parts of a chat. White space that follows a token
    in `stripping` is ignored. Tokens in `suppressed` are never generated."""

    words: Sequence[str]
    types: bytes
    scores: Sequence[float] | None
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    end_of_generation: frozenset[int]
    fill_in: FillInTokens | None = None
    marks: frozenset[int] = frozenset()
    stripping: frozenset[int] = frozenset()
    suppressed: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.words)


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    words = _read_words(metadata)
    ids = _ids_by_word(words)
    types = _read_types(metadata, len(words))
    ends = _end_of_generation(metadata, ids, types)
    fill_in = find_fill_in(ids, partial(read_token_id, metadata, count=len(words)))
    if fill_in is not None:  # Control tokens cannot come from a user's text. The file may give them another type.
        for token_id in (fill_in.prefix, fill_in.suffix, fill_in.middle):
            types[token_id] = TokenType.CONTROL
    _check_byte_words(words, types)
    return Vocabulary(
        words=words,
        types=bytes(types),
        scores=_read_numbers(metadata, "scores", len(words)),
        ids=ids,
        bos_id=read_token_id(metadata, "bos_token_id", len(words)),
        eos_id=read_token_id(metadata, "eos_token_id", len(words)),
        unknown_id=read_token_id(metadata, "unknown_token_id", len(words)),
        end_of_generation=ends,
        fill_in=fill_in,
        marks=frozenset(ids[text] for text in _MARK_TEXTS & ids.keys() if types[ids[text]] == TokenType.USER_DEFINED),
        stripping=_stripping(metadata, words, types),
        suppressed=_suppressed(metadata, len(words)),
    )


def read_token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    """Returns a token id, or None if it is missing or outside the vocabulary (2^32 - 1 means no token)."""
    value = metadata.get(key(name))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFileError(f"{key(name)} is not a whole number")
    return value if 0 <= value < count else None


def read_flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(key(name), default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{key(name)} is not a Boolean")
    return value


def read_strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(key(name))
    if value is None or isinstance(value, str) or not isinstance(value, Sequence):
        raise ModelFileError(f"{key(name)} is missing or not an array of text, so the model cannot read or write text")
    words = value[:]
    if not all(isinstance(word, str) for word in words):
        raise ModelFileError(f"{key(name)} is not an array of text")
    return list(words)


def _read_words(metadata: Mapping[str, Any]) -> list[str]:
    words = read_strings(metadata, "tokens")
    if not words:
        raise ModelFileError(f"{key('tokens')} is empty")
    longest = max(map(len, words))
    if longest > _MAX_WORD_CHARS:
        raise ModelFileError(f"{key('tokens')} has a token of {longest} characters, more than {_MAX_WORD_CHARS}")
    if "" in words:
        words = [word or f"[EMPTY_{index}]" for index, word in enumerate(words)]
    return words


def _ids_by_word(words: list[str]) -> dict[str, int]:
    ids = {word: index for index, word in enumerate(words)}
    if len(ids) != len(words):
        at = next(index for index, word in enumerate(words) if ids[word] != index)
        raise ModelFileError(f"{key('tokens')}: tokens {at} and {ids[words[at]]} are both {ascii(words[at])[:66]}")
    return ids


def _read_numbers(metadata: Mapping[str, Any], name: str, count: int, *, whole: bool = False) -> list[Any] | None:
    value = metadata.get(key(name))
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in ("iu" if whole else "iuf"):
        raise ModelFileError(f"{key(name)} is not an array of {'whole ' if whole else ''}numbers")
    if len(value) < count:
        raise ModelFileError(f"{key(name)} must be an array of {count} numbers or more, one for each token")
    numbers: list[Any] = value[:count].tolist()
    return numbers


def _read_types(metadata: Mapping[str, Any], count: int) -> bytearray:
    numbers = _read_numbers(metadata, "token_type", count, whole=True)
    if numbers is None:
        return bytearray([TokenType.NORMAL]) * count
    known = {int(kind) for kind in TokenType}
    return bytearray(number if number in known else TokenType.UNDEFINED for number in numbers)


def _end_of_generation(metadata: Mapping[str, Any], ids: Mapping[str, int], types: bytearray) -> frozenset[int]:
    """Returns the ids of tokens that end generation. Corrects the types of known words in `types`."""
    padding = {ids[text] for text in _PADDING_TEXTS if text in ids and types[ids[text]] == TokenType.CONTROL}
    by_text = {ids[text] for text in END_OF_GENERATION_TEXTS if text in ids}
    for token_id in by_text:
        types[token_id] = TokenType.CONTROL
    for text in _PLAIN_TEXTS & ids.keys():
        types[ids[text]] = TokenType.USER_DEFINED
    by_key = {read_token_id(metadata, name, len(types)) for name in _END_KEYS} - {None}
    ends = padding | by_text | by_key
    _keep_inner_marks(ids, types, ends)
    return frozenset(token_id for token_id in ends if token_id is not None)


def _keep_inner_marks(ids: Mapping[str, int], types: bytearray, ends: set[int | None]) -> None:
    """Removes `<|end|>` and `</s>` from `ends` if the chat format uses them inside answers or as plain words."""
    found = {text for text in END_OF_GENERATION_TEXTS if ids.get(text) in ends}
    calls = {"<|call|>", "<|calls|>"} & found
    if "<|end|>" in found and calls and found & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= found:
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL


def _stripping(metadata: Mapping[str, Any], words: Sequence[str], types: bytearray) -> frozenset[int]:
    """Returns the tokens after which white space is ignored. The model's name decides, as in llama.cpp, because GGUF
    has no key for these tokens."""
    name = metadata.get("general.name")
    if not isinstance(name, str) or not any(part in name.lower() for part in _STRIPPING_NAMES):
        return frozenset()
    special = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return frozenset(i for i, kind in enumerate(types) if kind in special and words[i] not in _NOT_STRIPPING_TEXTS)


def _suppressed(metadata: Mapping[str, Any], count: int) -> frozenset[int]:
    value = metadata.get(key(SUPPRESSED))
    if value is None:
        return frozenset()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) > _MAX_SUPPRESSED:
        raise ModelFileError(f"{key(SUPPRESSED)} is not an array of at most {_MAX_SUPPRESSED} whole numbers")
    return frozenset(token_id for token_id in value.tolist() if 0 <= token_id < count)


def _check_byte_words(words: list[str], types: bytearray) -> None:
    index = -1
    while (index := types.find(TokenType.BYTE, index + 1)) >= 0:
        if not _BYTE_TEXT.fullmatch(words[index]):
            raise ModelFileError(f"{key('tokens')}: byte token {index} is {ascii(words[index])[:66]}, not <0xNN>")
