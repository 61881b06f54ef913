"""Finds a model's tokens for filling in text between a prefix and a suffix, by llama.cpp's keys and words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

_PREFIXES: Final = (
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
)
_SUFFIXES: Final = (
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
)
_MIDDLES: Final = (
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
)
_REPOSITORIES: Final = ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")
_FILES: Final = ("<|file_sep|>",)


@dataclass(frozen=True, slots=True)
class FillInTokens:
    prefix: int
    suffix: int
    middle: int
    repository: int | None  # The token that precedes a project's name.
    file: int | None  # The token that precedes a file's name.


def find_fill_in(ids: Mapping[str, int], id_of_key: Callable[[str], int | None]) -> FillInTokens | None:
    """Returns the fill-in tokens, or None if the model has none. `id_of_key` returns the file's token id for a key."""

    def found(keys: str, words: tuple[str, ...]) -> int | None:
        given = (*(id_of_key(f"{key}_token_id") for key in keys.split()), *map(ids.get, words))
        return next((token_id for token_id in given if token_id is not None), None)

    prefix, suffix = found("fim_pre prefix", _PREFIXES), found("fim_suf suffix", _SUFFIXES)
    middle = found("fim_mid middle", _MIDDLES)
    if prefix is None or suffix is None or middle is None:
        return None
    return FillInTokens(prefix, suffix, middle, found("fim_rep", _REPOSITORIES), found("fim_sep", _FILES))
