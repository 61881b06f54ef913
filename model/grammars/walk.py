"""Follows a grammar for some tokens before a request is admitted, so that the request does not fail on a worker."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import RequestError
from llamaclust.core.sampler.matchers import AllowedTokens, Grammar
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

_CHOICES: Final = 32
_TOKENS: Final = 512
_LOOKED_BYTES: Final = 1 << 19
"""The maximum number of bytes of forced texts in a walk. Computing them takes about a third of a second."""
_NAMES: Final = 64
_FIRST: Final = b'{["'
_PREFERRED: Final = b'"{[],}:'
"""Bytes that lead to JSON with many properties and short values."""
_SHOWN_BYTES: Final = 60


class GrammarWalk:
    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        words = [*vocabulary.words]
        self._first, self._preferred = (
            [words.index(word) for byte in preferred if (word := bytes([byte])) in words]
            for preferred in (_FIRST, _PREFERRED)
        )
        self._ends = np.array(vocabulary.end_ids)
        self._spaces = np.array([token for token, word in enumerate(words) if word.isspace()], dtype=np.int64)

    def run(self, definition: str, names: Sequence[str] = ()) -> None:
        """Follows a grammar for some tokens, preferably keys in `names`. Raises RequestError if the grammar fails."""
        matcher = GrammarMatcher(Grammar(definition), self._vocabulary, is_costly=True)
        keys = deque(self._vocabulary.native.tokenize_bytes(_key(name)) for name in names[:_NAMES])
        taken: list[int] = []
        try:
            for _ in range(_CHOICES):
                taken += matcher.forced()
                following = self._next(matcher, keys, self._preferred if taken else self._first)
                if not following or matcher.position > _TOKENS or matcher.forced_text_bytes > _LOOKED_BYTES:
                    return
                matcher.take(following)
                taken += following
        except RequestError as error:
            text = b"".join(self._vocabulary.words[token] for token in taken)[-_SHOWN_BYTES:]
            raise RequestError(f"{error}; after {text.decode('utf-8', 'replace')!r}") from None

    def _next(self, matcher: GrammarMatcher, keys: deque[list[int]], preferred: list[int]) -> list[int]:
        allowed = matcher.allowed()
        assert allowed is not None, "it waits for no trigger"
        for key in keys:
            if _has(allowed, key[0]) and matcher.may_follow_all(key):
                keys.rotate(-1 - keys.index(key))
                return key
        token = next((token for token in preferred if _has(allowed, token)), None)
        return self._any(allowed) if token is None else [token]

    def _any(self, allowed: AllowedTokens) -> list[int]:
        """Returns the first allowed token, preferably other than white space, of which JSON may have much."""
        words = _without(allowed, self._ends)
        if np.any(others := _without(words, self._spaces)):
            words = others
        place = int(np.argmax(words != 0))
        word = int(words[place])
        return [] if not word else [place * 32 + (word & -word).bit_length() - 1]


def _without(allowed: AllowedTokens, tokens: NDArray[np.int64]) -> AllowedTokens:
    words = allowed.copy()
    np.bitwise_and.at(words, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
    return words


def _key(name: str) -> bytes:
    return f"{json.dumps(name, ensure_ascii=False)}:".encode("utf-8", "replace")


def _has(allowed: AllowedTokens, token: int) -> bool:
    return bool(allowed[token // 32] >> token % 32 & 1)
