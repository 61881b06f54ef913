"""The state of an answer in a grammar: which tokens may come next. It depends only on the grammar and the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llamaclust.core.errors import RequestError
from llamaclust.core.sampler.bounds import MAX_FORCED_TOKENS
from llamaclust.core.sampler.matchers import AllowedTokens, Grammar
from llamaclust.model.grammars.definitions import has_schemas_only
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

_Computed = TypeVar("_Computed")

CANNOT_BE_USED = "the grammar cannot be used: "
_DEAD_END = "NoExtensionBias"
_TOO_COMPLEX = "the grammar became too complex: "
_NOT_VERBOSE = "<non-verbose/>"
_MAX_FORCED_BYTES = 1 << 13
"""The maximum length of a text that a grammar may force. Computing such a text takes 5 ms."""


def _limits(definition: str) -> LLParserLimits:
    """Returns llguidance's limits. They are the same everywhere, so checks and answers accept the same grammars."""
    from llguidance import LLParserLimits

    # The largest of 1,232 public schemas needs 81,000 units of lexer fuel to compile, 373,000 units and 7,600 items in
    # a step, and 2,400 lexer states in an answer. Rules from users may be ambiguous. The time then grows with the
    # square of the items in a row, and is less than 50 ms for 800 items.
    return LLParserLimits(
        max_items_in_row=2000 if has_schemas_only(definition) else 800,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=500_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=60_000,
        verbose_errors=False,
    )


def compiled(definition: str, vocabulary: GrammarVocabulary) -> LLMatcher:
    """Returns a new matcher in its initial state. Does not copy a matcher, because copies share the lexer's limits."""
    from llguidance import LLMatcher

    return LLMatcher(vocabulary.native, definition, log_level=0, limits=_limits(definition))


def one_line(message: str, most: int = 400) -> str:
    folded = " ".join(message.split())
    return folded if len(folded) <= most else f"{folded[: most - 3]}..."


class TokenRefusedError(RequestError):
    """The grammar does not allow a token. The answer can continue with a new matcher that takes the same tokens."""


class LexerUsedUpError(RequestError):
    """The lexer's work limit is used up, and the state is lost. A new matcher with `is_costly` can restore it."""


class GrammarMatcher:
    """The state of one answer in a grammar. Must be used by one thread at a time. Methods release the GIL. They raise
    RequestError if the grammar cannot be followed, and LexerUsedUpError (unless `is_costly`) at the lexer's limit."""

    def __init__(self, grammar: Grammar, vocabulary: GrammarVocabulary, *, is_costly: bool = False) -> None:
        self.position = 0  # Number of tokens that were taken.
        self.forced_text_bytes = 0  # Total bytes of the forced texts that were computed.
        self._is_costly = is_costly
        self._vocabulary = vocabulary
        self._native = compiled(grammar.definition, vocabulary)
        self._check(CANNOT_BE_USED)
        self._ended = False
        self._following: list[int] | None = None  # Tokens that must come next, or None if they are not computed.
        self._allowed: AllowedTokens | None = None  # None if not computed.
        self._waiting = _Triggers(grammar.triggers, vocabulary) if grammar.triggers else None

    @property
    def is_free(self) -> bool:
        """True if the grammar waits for a trigger, so that every token is allowed."""
        return self._waiting is not None

    @property
    def is_complete(self) -> bool:
        return self._waiting is None and (self._ended or self._native.is_stopped())

    def take(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if self._waiting is not None:
                self._await_trigger(token)
            elif token in self._vocabulary.end_ids:
                self._ended = True
            elif not self._consumes(token):
                self.allowed()  # Raises an error that explains why the grammar failed.
                if not self._consumes(token):
                    self._check(_TOO_COMPLEX)
                    raise TokenRefusedError(f"the grammar does not allow token {token}")
            self._add(token)

    def try_take(self, token: int) -> AllowedTokens | None:
        """Takes a token if the grammar allows it, and returns None. Otherwise, returns the allowed tokens."""
        if self._waiting is not None:
            self._await_trigger(token)
        elif not self._allows(token):
            if not self.may_follow(token):
                return self.allowed()
            self.take((token,))
            return None
        self._add(token)
        return None

    def allowed(self) -> AllowedTokens | None:
        if self._waiting is not None:
            return None
        if self._ended:
            return _end_only(self._vocabulary)
        if self._allowed is None:
            bits = self._computed(lambda: self._native.compute_bitmask())
            self._allowed = np.frombuffer(bits, np.uint32)[: self._vocabulary.mask_words]
        return self._allowed

    def forced(self) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < MAX_FORCED_TOKENS and (following := self.next_forced()) is not None:
            self.take((following,))
            tokens.append(following)
        return tokens

    def next_forced(self) -> int | None:
        if self._waiting is not None or self._ended:
            return None
        following = self._computed(self._must_follow)
        return following[0] if following else None

    def peek_forced(self) -> list[int]:
        """Returns the tokens that must come next, without taking them."""
        if self._waiting is not None or self._ended:
            return []
        return self._computed(self._must_follow)[:MAX_FORCED_TOKENS]

    def may_follow(self, token: int) -> bool:
        allowed = self.allowed()
        return allowed is None or bool(allowed[token // 32] >> token % 32 & 1)

    def may_follow_all(self, tokens: Sequence[int]) -> bool:
        return self._native.validate_tokens([*tokens]) == len(tokens)

    def _add(self, token: int) -> None:
        self.position += 1
        self._following, self._allowed = None, None

    def _allows(self, token: int) -> bool:
        if self._ended:
            return token in self._vocabulary.end_ids
        following = self._must_follow()
        if token in self._vocabulary.end_ids:
            self._ended = not following and self._native.is_accepting()
            return self._ended
        if (following and token != following[0]) or not self._vocabulary.words[token]:
            return False
        return self._consumes(token)

    def _must_follow(self) -> list[int]:
        """Returns the forced next tokens, computed once per position. Raises RequestError if their text is too long."""
        if self._following is None:
            self._following = self._native.compute_ff_tokens()
            size = sum(len(self._vocabulary.words[token]) for token in self._following)
            self.forced_text_bytes += size
            if size > _MAX_FORCED_BYTES:
                raise RequestError(
                    f"the grammar forces a text of at least {size} bytes; the limit is {_MAX_FORCED_BYTES}"
                )
        return self._following

    def _consumes(self, token: int) -> bool:
        if self._is_costly:
            self.allowed()  # llguidance limits the lexer's work between two computations of the allowed tokens.
        return self._native.try_consume_tokens([token]) == 1

    def _computed(self, compute: Callable[[], _Computed]) -> _Computed:
        computed = compute()
        self._check(_TOO_COMPLEX, RequestError if self._is_costly else LexerUsedUpError)
        return computed

    def _await_trigger(self, token: int) -> None:
        assert self._waiting is not None
        for tokens in self._waiting.take(token):
            if self._native.try_consume_tokens(tokens) == len(tokens):
                self._waiting = None
                return
            self._native.reset()

    def _check(self, what: str, error: type[RequestError] = RequestError) -> None:
        if not self._native.is_error():
            return
        message = self._native.get_error()
        if message.startswith(_DEAD_END):
            raise RequestError("the answer cannot continue: the grammar has a rule that no text can complete")
        raise error(what + one_line(message.removesuffix(_NOT_VERBOSE)))


def _end_only(vocabulary: GrammarVocabulary) -> AllowedTokens:
    bits = np.zeros(vocabulary.mask_words, np.uint32)
    for token in vocabulary.end_ids:
        bits[token // 32] |= np.uint32(1 << token % 32)
    return bits


class _Triggers:
    def __init__(self, texts: tuple[str, ...], vocabulary: GrammarVocabulary) -> None:
        self._texts = [text.encode() for text in texts]
        self._longest = max(map(len, self._texts))
        self._vocabulary = vocabulary
        self._tail = b""  # The last bytes of the answer.
        self._newest: list[tuple[int, int]] = []  # Tokens of `_tail`, with their lengths in bytes.

    def take(self, token: int) -> list[list[int]]:
        """Takes a token. For each trigger that this token completes, returns the tokens since the trigger's start."""
        word = self._vocabulary.words[token].removeprefix(b"\xff")
        before = len(self._tail)
        self._tail += word
        self._newest.append((token, len(word)))
        places = {place for text in self._texts for place in _places(self._tail, text, before)}
        found = [self._tokens_from(place) for place in sorted(places)]
        while self._newest and len(self._tail) - self._newest[0][1] >= self._longest:
            self._tail = self._tail[self._newest.pop(0)[1] :]
        return found

    def _tokens_from(self, place: int) -> list[int]:
        start = 0
        for index, (_, length) in enumerate(self._newest):
            if start == place:
                return [token for token, _ in self._newest[index:]]
            start += length
        return self._vocabulary.native.tokenize_bytes(self._tail[place:])


def _places(data: bytes, text: bytes, before: int) -> list[int]:
    places, place = [], data.find(text, max(0, before - len(text) + 1))
    while place >= 0:
        places.append(place)
        place = data.find(text, place + 1)
    return places
