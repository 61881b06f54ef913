"""A model's vocabulary in the form that llguidance needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from time import sleep
from typing import TYPE_CHECKING, Final

from llamaclust.model.grammars.reasoning import may_run_over
from llamaclust.model.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_SPECIAL: Final = b"\xff"
"""llguidance's prefix for the names of tokens without text."""
_SLICES: Final = [r'[^"\\\x00-\x1F\x7F]{1,30}', r'[^"\\\x00-\x1F\x7F]+']
"""Patterns of text in JSON strings. llguidance computes the allowed tokens of a whole pattern at once. Its default
patterns take 1.5 times the time and memory."""
_KEPT_TEXTS: Final = 1024
_KEPT_TAGS: Final = 16


class GrammarVocabulary:
    def __init__(self, words: Sequence[bytes], end_ids: Sequence[int], encode: Callable[[str], list[int]]) -> None:
        self.words = words
        self.end_ids = tuple(end_ids)
        self.mask_words = (len(words) + 31) // 32  # Number of 32-bit words in a bit mask of all tokens.
        self._encode = encode
        self.may_run_over = lru_cache(_KEPT_TAGS)(partial(may_run_over, words))
        """The function `may_run_over`, cached by tag. The first call takes 0.2 s for 256 Ki tokens."""

    @cached_property
    def native(self) -> LLTokenizer:
        """llguidance's tokenizer. Building it takes 0.3 s for 256 Ki tokens and blocks other threads twice, because
        building it at once would block them for the whole time."""
        from llguidance import LLTokenizer  # Imported late, because the import takes a fifteenth of a worker's start.

        words = _Words(self.words, self.end_ids, self._encode)
        plain = LLTokenizer(words, eos_token=list(self.end_ids), slices=[])  # type: ignore[arg-type]
        sleep(0)  # Other threads run.
        return plain.with_slices(_SLICES)


class _Words:
    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, words: Sequence[bytes], end_ids: Sequence[int], encode: Callable[[str], list[int]]) -> None:
        self.tokens = words
        self.eos_token_id = end_ids[0]
        self._encode = lru_cache(_KEPT_TEXTS)(encode)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def read_vocabulary(tokenizer: Tokenizer, size: int) -> GrammarVocabulary:
    known = min(size, tokenizer.vocabulary_size)
    words = grammar_words(tokenizer)[:known] + [b""] * (size - known)

    def encode(text: str) -> list[int]:
        return tokenizer.encode_plain(text, after_special=False)

    return GrammarVocabulary(words, sorted(tokenizer.end_of_generation), encode)


def grammar_words(tokenizer: Tokenizer) -> list[bytes]:
    words = tokenizer.all_bytes()
    for token in tokenizer.control_ids:
        words[token] = _SPECIAL + words[token]
    return words
