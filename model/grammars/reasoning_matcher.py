"""The state of an answer that has a reasoning budget, or a grammar that begins after the reasoning."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np

from llamaclust.core.sampler.bounds import MAX_FORCED_TOKENS
from llamaclust.core.sampler.matchers import AllowedTokens, MatcherStart, Reasoning
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.reasoning import ReasoningState
from llamaclust.model.grammars.vocabulary import GrammarVocabulary


class ReasoningMatcher:
    """A matcher of reasoning, and of a grammar if there is one. It has the same methods as `GrammarMatcher`."""

    def __init__(self, reasoning: Reasoning, grammar: GrammarMatcher | None, vocabulary: GrammarVocabulary) -> None:
        self.position = 0  # Number of tokens that were taken.
        self._state = ReasoningState(reasoning, vocabulary.words)
        self._grammar = grammar
        self._delays = reasoning.delays_grammar
        self._vocabulary = vocabulary
        is_delayed = grammar is not None and reasoning.delays_grammar
        self._may_run_over = [vocabulary.may_run_over(tag.encode()) for tag in reasoning.ends] if is_delayed else []

    @property
    def is_complete(self) -> bool:
        """True if the answer must end, or if the next token is forced by the reasoning budget."""
        grammar = self._active_grammar
        return self._state.forced is not None or (grammar is not None and grammar.is_complete)

    def take(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._forced()
            if (grammar := self._active_grammar) is not None:
                grammar.take((token,))
            self._add(token)

    def try_take(self, token: int) -> AllowedTokens | None:
        forced, grammar = self._forced(), self._active_grammar
        if forced is not None and token != forced:
            return _only(forced, self._vocabulary)
        if grammar is not None and (allowed := grammar.try_take(token)) is not None:
            return allowed
        if grammar is None and self._leaves_out_grammar(token):
            return self._ends_within()
        self._add(token)
        return None

    def allowed(self) -> AllowedTokens | None:
        """Returns the tokens that may come next, or None if all may. `try_take` may still refuse some of them."""
        if (forced := self._forced()) is not None:
            return _only(forced, self._vocabulary)
        return None if self._active_grammar is None else self._active_grammar.allowed()

    def forced(self) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < MAX_FORCED_TOKENS:
            following, grammar = self._forced(), self._active_grammar
            if following is None and grammar is not None:
                following = grammar.next_forced()
            if following is None:
                break
            self.take((following,))
            tokens.append(following)
        return tokens

    def peek_forced(self) -> list[int]:
        if self._forced() is not None:
            return self._state.forced_end[:MAX_FORCED_TOKENS]
        return [] if self._active_grammar is None else self._active_grammar.peek_forced()

    @property
    def _active_grammar(self) -> GrammarMatcher | None:
        """The grammar, or None while reasoning delays it. Reasoning delays only a grammar that has not begun."""
        grammar = self._grammar
        if grammar is None or not self._delays or not self._state.is_inside:
            return grammar
        return grammar if grammar.position and not grammar.is_free else None

    def _forced(self) -> int | None:
        forced, grammar = self._state.forced, self._active_grammar
        if forced is None or grammar is None or grammar.may_follow(forced):
            return forced
        self._state.release()
        return None

    def _add(self, token: int) -> None:
        """Takes a token. A grammar that waits for a trigger also gets the token that ends the reasoning."""
        is_delayed = self._grammar is not None and self._active_grammar is None
        self._state.take(token)
        self.position += 1
        if is_delayed and self._grammar is not None and self._grammar.is_free and not self._state.is_inside:
            self._grammar.take((token,))

    def _leaves_out_grammar(self, token: int) -> bool:
        """Returns True for a token that ends the answer, or runs over the end tag, before a grammar that must follow
        the reasoning has begun."""
        grammar = self._grammar
        if grammar is None or grammar.is_free:
            return False
        return token in self._vocabulary.end_ids or self._state.runs_over(token)

    def _ends_within(self) -> AllowedTokens:
        bits = np.full(self._vocabulary.mask_words, (1 << 32) - 1, np.uint32)
        over = filter(self._state.runs_over, chain.from_iterable(self._may_run_over))
        for token in chain(over, self._vocabulary.end_ids):
            bits[token // 32] &= ~np.uint32(1 << token % 32)
        return bits


def answer_matcher(
    start: MatcherStart, vocabulary: GrammarVocabulary, *, is_costly: bool = False
) -> GrammarMatcher | ReasoningMatcher:
    grammar = None if start.grammar is None else GrammarMatcher(start.grammar, vocabulary, is_costly=is_costly)
    if start.reasoning is not None:
        return ReasoningMatcher(start.reasoning, grammar, vocabulary)
    assert grammar is not None, "an answer without a grammar has reasoning to follow"
    return grammar


def _only(token: int, vocabulary: GrammarVocabulary) -> AllowedTokens:
    bits = np.zeros(vocabulary.mask_words, np.uint32)
    bits[token // 32] |= np.uint32(1 << token % 32)
    return bits
