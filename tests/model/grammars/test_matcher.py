"""Checks that a matcher's state depends only on grammar and tokens."""

from __future__ import annotations

import json
from copy import copy
from random import Random
from unittest.mock import Mock

import pytest
from jsonschema import Draft202012Validator

from llamaclust.core.errors import RequestError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher, LexerUsedUpError
from llamaclust.model.grammars.vocabulary import GrammarVocabulary, read_vocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.chat.random_schemas import random_instance, random_schema, token_set, walk
from support.models.tiny_tokenizers import byte_level, sentencepiece
from support.seed import SEED

SIZE = 330
BYTES = GrammarVocabulary([*(bytes([byte]) for byte in range(256)), b"\xff<end>"], [256], lambda text: [*text.encode()])
ABC = definitions.of_regex("[ab]c[de]", "guided_regex")


@pytest.fixture(scope="module", params=[sentencepiece, byte_level])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.param(SIZE))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> GrammarVocabulary:
    return read_vocabulary(tokenizer, SIZE + 7)


@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_random_answers_are_valid_and_their_states_can_be_built_again(
    seed: int, tokenizer: Tokenizer, vocabulary: GrammarVocabulary
) -> None:
    source = Random(seed)
    schema = random_schema(source)
    grammar = definitions.of_schema(schema, "json_schema")
    tokens, sets = walk(GrammarMatcher(grammar, vocabulary), source)
    if set(vocabulary.end_ids) & sets[-1]:
        body = [token for token in tokens if token not in vocabulary.end_ids]
        Draft202012Validator(schema).validate(json.loads(tokenizer.decode_bytes(body)))
    for place in source.sample(range(len(sets)), min(8, len(sets))):
        again = GrammarMatcher(grammar, vocabulary)
        again.take(tokens[:place])
        assert token_set(again.allowed()) == sets[place], f"after {place} of {tokens}"


def test_valid_instances_of_1000_schemas_are_allowed() -> None:
    """Checks instances whose characters are unescaped where JSON allows it; llguidance requires U+007F escaped."""
    for seed in range(SEED, SEED + 1000):
        source = Random(seed)
        schema = random_schema(source)
        matcher = GrammarMatcher(definitions.of_schema(schema, "json_schema"), BYTES)
        instance = random_instance(schema, source)
        Draft202012Validator(schema).validate(instance)
        separators = source.choice([(",", ":"), (", ", ": ")])
        text = json.dumps(instance, ensure_ascii=False, separators=separators)
        matcher.take(text.encode())
        assert 256 in token_set(matcher.allowed()), f"seed {seed}: {text} of {schema}"


@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_forced_tokens_are_the_only_ones_that_are_allowed(seed: int, vocabulary: GrammarVocabulary) -> None:
    source = Random(seed)
    grammar = definitions.of_schema(random_schema(source), "json_schema")
    forcing, tokens, forced_tokens = GrammarMatcher(grammar, vocabulary), list[int](), 0
    while not forcing.is_complete and len(tokens) < 200:
        forced = forcing.forced()
        for token in forced:
            single = GrammarMatcher(grammar, vocabulary)
            single.take(tokens)
            assert token_set(single.allowed()) == {token}, f"after {tokens}"
            tokens.append(token)
        forced_tokens += len(forced)
        if not forcing.is_complete:
            tokens.append(source.choice(sorted(token_set(forcing.allowed()))))
            forcing.take(tokens[-1:])
    assert forced_tokens > 0


@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_exactly_the_allowed_tokens_are_taken_in(seed: int, vocabulary: GrammarVocabulary) -> None:
    """Checks positions with and without forced tokens and at the grammar's end; some tokens have no bytes."""
    source = Random(seed)
    grammar = definitions.of_schema(random_schema(source), "json_schema")
    tokens, sets = walk(GrammarMatcher(grammar, vocabulary), source)
    tokens.append(vocabulary.end_ids[0])
    sets.append(set(vocabulary.end_ids))
    for place in source.sample(range(len(sets)), min(6, len(sets))):
        matcher = GrammarMatcher(grammar, vocabulary)
        matcher.take(tokens[:place])
        if matcher.forced():
            sets[place] = token_set(matcher.allowed())
        taken = {token for token in range(len(vocabulary.words)) if _copy(matcher).try_take(token) is None}
        assert taken == sets[place], f"after {tokens[:place]}"
        refusing = _copy(matcher)
        for token in set(range(len(vocabulary.words))) - taken:
            refused = refusing.try_take(token)
            assert refused is not None and token_set(refused) == taken
        assert token_set(refusing.allowed()) == taken and refusing.position == matcher.position, "nothing has changed"


def test_a_grammar_too_costly_without_its_allowed_tokens_is_followed_with_them() -> None:
    """Checks a grammar that exceeds llguidance's limit of lexer cost between computations of allowed tokens."""
    schema = {"type": "string", "pattern": r"^(?:\S+\s+){0,29}\S+$", "maxLength": 400}
    grammar = definitions.of_schema(schema, "json_schema")
    text = b'"the quick brown fox jumps over the lazy dog again and again, and once more"'
    seldom, always, costly = GrammarMatcher(grammar, BYTES), GrammarMatcher(grammar, BYTES), _costly(grammar)
    seldom.allowed()
    with pytest.raises(LexerUsedUpError, match="the grammar became too complex"):
        for token in text:
            seldom.try_take(token)
    for token in text:
        assert always.try_take(token) is None
        allowed = token_set(always.allowed())
    costly.take(text)
    assert token_set(costly.allowed()) == allowed == {256}


def _costly(grammar: Grammar) -> GrammarMatcher:
    return GrammarMatcher(grammar, BYTES, is_costly=True)


def test_a_costly_matcher_whose_lexer_is_used_up_fails_for_good() -> None:
    matcher, costly = GrammarMatcher(ABC, BYTES), _costly(ABC)
    for each in (matcher, costly):
        each.take(b"a")
        each._native = Mock()
        each._native.compute_ff_tokens.return_value = []
        each._native.is_error.return_value = True
        each._native.get_error.return_value = "fuel"
    with pytest.raises(LexerUsedUpError, match="too complex: fuel"):
        matcher.forced()
    with pytest.raises(RequestError, match="too complex: fuel") as failure:
        costly.forced()
    assert not isinstance(failure.value, LexerUsedUpError)


def _copy(matcher: GrammarMatcher) -> GrammarMatcher:
    made = copy(matcher)
    made._native = matcher._native.deep_copy()
    return made


def test_an_answer_ends_where_its_grammar_does(vocabulary: GrammarVocabulary) -> None:
    matcher = GrammarMatcher(definitions.of_choice(["a"], "guided_choice"), vocabulary)
    (token,) = matcher.forced()
    assert vocabulary.words[token] == b"a" and matcher.is_complete
    assert token_set(matcher.allowed()) == set(vocabulary.end_ids)
    matcher.take(vocabulary.end_ids[:1])
    assert token_set(matcher.allowed()) == set(vocabulary.end_ids) and matcher.position == 2


def test_tokens_that_break_the_grammar_are_an_error(vocabulary: GrammarVocabulary) -> None:
    matcher = GrammarMatcher(definitions.of_choice(["a"], "guided_choice"), vocabulary)
    wrong = vocabulary.words.index(b"b")
    with pytest.raises(RequestError, match=f"the grammar does not allow token {wrong}"):
        matcher.take([wrong])


def test_a_grammar_that_cannot_be_compiled_is_an_error(vocabulary: GrammarVocabulary) -> None:
    with pytest.raises(RequestError, match="the grammar cannot be used: "):
        GrammarMatcher(Grammar('{"grammars": [{"lark_grammar": "start: nothing"}]}'), vocabulary)


def test_a_grammar_with_triggers_rules_from_the_first_one_on(
    tokenizer: Tokenizer, vocabulary: GrammarVocabulary
) -> None:
    lark = 'start: "<call>" /[a-c]+/ "</call>"'
    grammar = definitions.lazy(definitions.of_lark(lark, "tools"), ["<call>", "<other>"])
    text = tokenizer.encode_plain("free text, <calm> <call>", after_special=True)
    matcher = GrammarMatcher(grammar, vocabulary)
    for token in text:
        assert matcher.is_free and matcher.allowed() is None and matcher.forced() == []
        matcher.take([token])
    assert not matcher.is_free
    words = {vocabulary.words[token] for token in token_set(matcher.allowed())}
    assert {b"a", b"b", b"c"} <= words and b"d" not in words
    again = GrammarMatcher(grammar, vocabulary)
    again.take(text)
    assert token_set(again.allowed()) == token_set(matcher.allowed())
    matcher.take(tokenizer.encode_plain("ab</call>", after_special=False))
    assert matcher.is_complete


def test_a_trigger_may_begin_and_end_within_tokens() -> None:
    words = [bytes([byte]) for byte in range(256)] + [b"x<c", b"all>a", b""]
    vocabulary = GrammarVocabulary(words, [258], lambda text: list(text.encode()))
    grammar = definitions.lazy(definitions.of_lark('start: "<call>" /[a-c]+/ "!"', "tools"), ["<call>"])
    matcher = GrammarMatcher(grammar, vocabulary)
    matcher.take([256])
    assert matcher.is_free
    matcher.take([257])
    assert {chr(token) for token in token_set(matcher.allowed())} == set("abc!")


def test_what_a_trigger_cannot_begin_stays_free(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    grammar = definitions.lazy(definitions.of_lark('start: "other"', "tools"), ["<call>"])
    matcher = GrammarMatcher(grammar, vocabulary)
    matcher.take(tokenizer.encode_plain("<call><call>", after_special=False))
    assert matcher.is_free


@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_peeked_tokens_must_follow_and_are_not_taken_in(seed: int, vocabulary: GrammarVocabulary) -> None:
    """Checks that the first peeked token is exact; the others may differ from later ones with the same bytes."""
    source = Random(seed)
    grammar = definitions.of_schema(random_schema(source), "json_schema")
    tokens, sets = walk(GrammarMatcher(grammar, vocabulary), source)
    matcher, right, peeked = GrammarMatcher(grammar, vocabulary), 0, 0
    for place, token in enumerate(tokens):
        following = matcher.peek_forced()
        assert following == matcher.peek_forced() and matcher.position == place
        assert not following or following[0] == token
        right += sum(a == b for a, b in zip(following, tokens[place:], strict=False))
        peeked += min(len(following), len(tokens) - place)
        assert token_set(matcher.allowed()) == sets[place]
        assert matcher.try_take(token) is None
    assert right >= 0.95 * peeked, f"seed {seed}: {right} of {peeked}"


_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x202E, 0x2028, 0x2029, 0xFEFF)
_EDGES = (*b'/"\\|#', 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFE, 0xFFFF, 0x10000, 0x1F600, 0x10FFFF)


@pytest.mark.parametrize("code_point", [*_CONTROLS, *_EDGES], ids=hex)
def test_choices_and_literals_have_any_character(code_point: int) -> None:
    text = f"a{chr(code_point)}"
    for shown in (text, text[1:], text + "b"):
        grammars = (
            definitions.of_choice([shown, "zz"], "guided_choice"),
            definitions.of_calls(f"start: {definitions.quoted(shown)}", "tools"),
        )
        for grammar in grammars:
            matcher = GrammarMatcher(grammar, BYTES)
            for byte in shown.encode():
                assert byte in token_set(matcher.allowed())
                matcher.take([byte])
            assert 256 in token_set(matcher.allowed())
