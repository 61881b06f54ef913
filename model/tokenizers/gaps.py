"""Prompts that ask for text between a prefix and a suffix, with tokens in llama.cpp's order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from llamaclust.model.tokenizers.fill_in import FillInTokens
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_PROJECT: Final = "myproject\n"
_THIS_FILE: Final = "filename\n"
_SNIPPET: Final = "\n\n--- snippet ---\n\n"


@dataclass(frozen=True, slots=True)
class OtherFile:
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Gap:
    prefix: str
    suffix: str
    begun: str = ""  # The beginning of the answer. Control words in it become control tokens.
    files: tuple[OtherFile, ...] | None = None  # None means no files and no tokens that mark files.

    @property
    def characters(self) -> int:
        return len(self.prefix) + len(self.suffix) + len(self.begun)


def fill_in_prompt(tokenizer: Tokenizer, tokens: FillInTokens, gap: Gap, room: int) -> list[int]:
    """Returns the prompt's token ids. If they exceed `room`, omits the first tokens of `gap.files`."""
    around = [
        *([tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []),
        tokens.prefix,
        *_plain(tokenizer, gap.prefix),
        *tokenizer.encode(gap.begun, add_special=False, parse_special=True),
        tokens.suffix,
        *_plain(tokenizer, gap.suffix),
        tokens.middle,
    ]
    left = room - len(around)
    if gap.files is None or left <= 0:
        return around
    return [*_files(tokenizer, tokens, gap.files, left), *around]


def _files(tokenizer: Tokenizer, tokens: FillInTokens, files: tuple[OtherFile, ...], room: int) -> list[int]:
    parts: list[list[int]] = []
    left = room
    for mark, text in _file_parts(tokens, files):
        part = [*mark, *_plain(tokenizer, text[-left * tokenizer.longest_word :])][-left:]
        parts.append(part)
        left -= len(part)
        if left == 0:
            break
    return [token for part in reversed(parts) for token in part]


def _file_parts(tokens: FillInTokens, files: tuple[OtherFile, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    if tokens.file is not None:
        yield (tokens.file,), _THIS_FILE
    for file in reversed(files):
        yield (), file.text
        yield ((), _SNIPPET) if tokens.file is None else ((tokens.file,), f"{file.name}\n")
    if tokens.repository is not None:
        yield (tokens.repository,), _PROJECT


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False) if text else []
