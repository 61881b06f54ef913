"""Sequence breakers of the DRY sampler. DRY penalizes repetitions, except those that contain a breaker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache

from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_BREAKERS_TOKENS
from llamaclust.model.tokenizers.token_index import TokenIndex
from llamaclust.model.tokenizers.tokenizer import Tokenizer

DEFAULT_BREAKERS = ("\n", ":", '"', "*")
MAX_BREAKERS = 64
MAX_BREAKER_BYTES = 40

Breakers = Mapping[int, tuple[tuple[int, ...], ...]]

_KEPT = 16


def check_size(tokens: int) -> None:
    if tokens > MAX_BREAKERS_TOKENS:
        raise ParameterError(
            "dry_sequence_breakers",
            f"the token sequences that contain these texts have {tokens} tokens; the limit is {MAX_BREAKERS_TOKENS}: "
            "give fewer or rarer texts",
        )


class BreakerTokens:
    """Finds the token sequences whose text contains a given string. Not thread-safe. The first search indexes the
    vocabulary, which takes about a second for 262,144 tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sequences = lru_cache(_KEPT)(self._find)

    def of(self, texts: Sequence[str]) -> Breakers:
        """Returns the token sequences that contain any of `texts`, keyed by their first token. Raises ParameterError if
        the sequences have too many tokens in total."""
        by_head: dict[int, dict[tuple[int, ...], None]] = {}
        tokens = 0
        for text in texts:
            for sequence in self._sequences(text):
                sequences = by_head.setdefault(sequence[0], {})
                if sequence not in sequences:
                    sequences[sequence] = None
                    tokens += len(sequence)
            check_size(tokens)
        return {head: tuple(sequences) for head, sequences in by_head.items()}

    @cached_property
    def _index(self) -> TokenIndex:
        return TokenIndex([self._tokenizer.token_bytes(token) for token in range(self._tokenizer.vocabulary_size)])

    def _find(self, text: str) -> tuple[tuple[int, ...], ...]:
        whole = text.encode("utf-8", "surrogatepass")
        found: list[tuple[int, ...]] = [(token,) for token in self._index.containing(whole)]
        containing, tokens = {token for (token,) in found}, len(found)
        for cut in range(1, len(whole)):
            check_size(tokens)
            heads = [token for token in self._index.ending_with(whole[:cut]) if token not in containing]
            if heads and (rest := self._rest(whole, cut)):
                found += [(token, *rest) for token in heads]
                tokens += len(heads) * (1 + len(rest))
        return tuple(found)

    def _rest(self, whole: bytes, cut: int) -> tuple[int, ...]:
        try:
            rest = whole[cut:].decode()
        except UnicodeDecodeError:
            return ()
        return tuple(self._tokenizer.encode(rest, add_special=False))


class SeenBreakers:
    """Finds the DRY sampler's sequence breakers whose tokens have occurred. The last of several may be missing."""

    __slots__ = ("_by_head", "_found", "_seen", "_sequences", "_waiting")

    def __init__(self, by_head: Breakers, tokens: Iterable[int]) -> None:
        self._by_head = by_head
        self._seen: set[int] = set()
        # Breakers with tokens that have not occurred yet, keyed by one such token.
        self._waiting: dict[int, list[tuple[int, ...]]] = {}
        self._found: list[tuple[int, ...]] = []
        self._sequences: tuple[tuple[int, ...], ...] = ()
        for token in dict.fromkeys(tokens) if by_head else ():
            self.add(token)

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        if len(self._sequences) < len(self._found):
            self._sequences = tuple(self._found)
        return self._sequences

    def with_tokens(self, tokens: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """Returns what `sequences` would be after adding `tokens`, without adding them."""
        if not self._by_head or self._seen.issuperset(tokens):
            return self.sequences
        more = copy(self)
        more._seen, more._found = self._seen.copy(), self._found.copy()
        more._waiting = {token: [*sequences] for token, sequences in self._waiting.items()}
        for token in tokens:
            more.add(token)
        return more.sequences

    def add(self, token: int) -> None:
        if not self._by_head or token in self._seen:
            return
        self._seen.add(token)
        for sequence in (*self._by_head.get(token, ()), *self._waiting.pop(token, ())):
            missing = next((other for other in sequence[:-1] if other not in self._seen), None)
            if missing is None:
                self._found.append(sequence)
            else:
                self._waiting.setdefault(missing, []).append(sequence)
