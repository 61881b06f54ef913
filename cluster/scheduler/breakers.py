"""Sequence breakers of DRY as token sequences: a repetition does not extend over one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache

from llamaclust.model.tokenizers.tokenizer import Tokenizer

DEFAULT_BREAKERS = ("\n", ":", '"', "*")
MAX_BREAKERS = 64
MAX_BREAKER_BYTES = 40

Breakers = Mapping[int, tuple[tuple[int, ...], ...]]
"""Token sequences by their first token."""

_KEPT = 256


class BreakerTokens:
    """The token sequences that contain a text, for one tokenizer. The first use of a text is slow; thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sequences = lru_cache(_KEPT)(self._find)

    def of(self, texts: Sequence[str]) -> Breakers:
        """For all of these texts."""
        by_head: dict[int, dict[tuple[int, ...], None]] = {}
        for text in texts:
            for sequence in self._sequences(text):
                by_head.setdefault(sequence[0], {})[sequence] = None
        return {head: tuple(sequences) for head, sequences in by_head.items()}

    @cached_property
    def _words(self) -> list[bytes]:
        return [self._tokenizer.token_bytes(token) for token in range(self._tokenizer.vocabulary_size)]

    def _find(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Each token that has the text in it; and each that ends with its beginning, followed by its rest as tokens."""
        whole = text.encode("utf-8", "surrogatepass")
        rests = {whole[:cut]: self._rest(whole, cut) for cut in range(1, len(whole))}
        found: list[tuple[int, ...]] = []
        for token, word in enumerate(self._words):
            if whole in word:
                found.append((token,))
                continue
            for count in range(1, min(len(word), len(rests)) + 1):
                if rest := rests.get(word[-count:]):
                    found.append((token, *rest))
        return tuple(found)

    def _rest(self, whole: bytes, cut: int) -> tuple[int, ...]:
        """Tokens of what follows the first `cut` bytes; none where these end within a character."""
        try:
            rest = whole[cut:].decode()
        except UnicodeDecodeError:
            return ()
        return tuple(self._tokenizer.encode(rest, add_special=False))


class SeenBreakers:
    """A request's sequences whose first token has occurred: others cannot be in its history."""

    __slots__ = ("_by_head", "_seen", "sequences")

    def __init__(self, by_head: Breakers, tokens: Iterable[int]) -> None:
        self._by_head = by_head
        self._seen: set[int] = set()
        self.sequences: tuple[tuple[int, ...], ...] = ()
        if by_head:
            for token in tokens:
                self.add(token)

    def add(self, token: int) -> None:
        """One more token has occurred."""
        if token in self._by_head and token not in self._seen:
            self._seen.add(token)
            self.sequences += self._by_head[token]
