"""Joins a query and a document in the form that rerankers were trained on, like llama.cpp's `format_prompt_rerank`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import text_of
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.model.tokenizers.vocabulary import key, read_flag, read_token_id

_SEPARATED: Final = ("jina-v1-en", "jina-v2-code", "roberta-bpe")
"""Pre-tokenizers of models with a token between texts, unless a flag in the file says otherwise."""


@dataclass(frozen=True, slots=True)
class PairForm:
    first: tuple[int, ...]
    between: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.first) + len(self.between) + len(self.last)

    def prompt(self, query: Sequence[int], document: Sequence[int]) -> tuple[int, ...]:
        return (*self.first, *query, *self.between, *document, *self.last)


def read_pair_form(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> PairForm:
    kind, size = metadata.get("tokenizer.ggml.model"), tokenizer.vocabulary_size
    is_word_pieces = kind == "bert"
    separator = read_token_id(metadata, "seperator_token_id", size)  # GGUF misspells the key.
    if separator is None and is_word_pieces:
        separator = tokenizer.eos_id
    end = read_token_id(metadata, "eos_token_id", size)
    ends = _tokens(read_flag(metadata, "add_eos_token", kind == "t5"), separator if end is None else end, "eos")
    separates = is_word_pieces or text_of(metadata, "tokenizer.ggml.pre") in _SEPARATED
    separators = _tokens(read_flag(metadata, "add_sep_token", separates), separator, "seperator")
    begins = _tokens(tokenizer.add_bos, tokenizer.bos_id, "bos")
    return PairForm(begins, (*ends, *separators), ends)


def _tokens(is_wanted: bool, token: int | None, name: str) -> tuple[int, ...]:
    if is_wanted and token is None:
        raise ModelFileError(f"{key(f'{name}_token_id')} is missing, and the model needs it to rank documents")
    return (token,) if is_wanted and token is not None else ()
