"""Checks that the tokens which end a reasoning budget depend only on settings and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from llamaclust.core.errors import RequestError
from llamaclust.core.sampler.bounds import MAX_FORCED_TOKENS
from llamaclust.core.sampler.matchers import Grammar, MatcherStart, Reasoning
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.reasoning import Place, ReasoningScanner, ReasoningState, may_run_over
from llamaclust.model.grammars.reasoning_matcher import ReasoningMatcher, answer_matcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from support.chat.random_schemas import token_set
from support.seed import SEED

BEGIN, END = "<t>", "</t>"
PIECES = [b"</", b"t>", b"</t", b"</t>", b"<t>", b"<t>\n", b"> ", b">{", b"\xc3", b"\xa9", b"\xe6\xbc", b"\xff<end>"]
WORDS = [*(bytes([byte]) for byte in range(128)), *PIECES]
VOCABULARY = GrammarVocabulary(WORDS, [len(WORDS) - 1], lambda text: [*text.encode()])
JSON = definitions.of_regex(r"\{[a-f]{3}\}", "guided_regex")


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def piece(data: bytes) -> int:
    return WORDS.index(data)


def reasoning(budget: int | None, *, is_open: bool = True, repeats: bool = False, delays: bool = False) -> Reasoning:
    return Reasoning((BEGIN,), (END,), ids(END), budget, is_open, repeats, delays)


def answered(state: ReasoningState, text: str) -> str:
    """Returns the answer of a model that writes `text` token by token, with forced tokens inserted."""
    said, left = "", list(ids(text))
    while left or state.forced is not None:
        token = left.pop(0) if state.forced is None else state.forced
        state.take(token)
        said += chr(token)
    return said


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        (reasoning(5), "ab</t>cdefgh", "ab</t>cdefgh"),
        (reasoning(3), "abcdef", "abc</t>def"),
        (reasoning(0), "abc", "</t>abc"),
        (reasoning(None), "abcdef", "abcdef"),
        (reasoning(2, is_open=False), "abc<t>defgh", "abc<t>defgh"),
        (reasoning(2, is_open=False), " \n<t>abc", " \n<t>ab</t>c"),
        (reasoning(0, is_open=False), "<t>abc", "<t></t>abc"),
        (reasoning(2), "ab<t>cdef", "ab</t><t>cd</t>ef"),
        (reasoning(2), "abc<t>def", "ab</t>c<t>def"),
        (reasoning(2, repeats=True), "abc<t>def", "ab</t>c<t>de</t>f"),
        (reasoning(6), "a</tb</t>cde", "a</tb</t>cde"),
        (reasoning(3), "a</tb</t>cde", "a</tb</t></t>cde"),
        (reasoning(2), "a<<<<<<b", "a<<<<</t><<b"),
        (reasoning(3, is_open=False), "<<t>abcdef", "<<t>abcdef"),
    ],
)
def test_end_follows_after_the_budget(settings: Reasoning, text: str, expected: str) -> None:
    assert answered(ReasoningState(settings, WORDS), text) == expected


def test_any_of_several_tags_begins_and_ends_reasoning() -> None:
    settings = Reasoning(("<a>", "<b>"), ("</a>", "</b>"), ids("</a>"), 4, repeats=True)
    assert answered(ReasoningState(settings, WORDS), "<b>ab</b><a>cdefg") == "<b>ab</b><a>cdef</a>g"


def test_end_waits_for_the_end_of_a_character() -> None:
    state = ReasoningState(reasoning(1), WORDS)
    state.take(piece(b"\xc3"))
    assert state.forced is None
    state.take(piece(b"\xa9"))
    assert state.forced == ids(END)[0]
    state = ReasoningState(reasoning(1), WORDS)
    for _ in range(3):
        state.take(piece(b"\xe6\xbc"))
        assert state.forced is None, "one may be the beginning of a character"
    state.take(piece(b"\xe6\xbc"))
    assert state.forced is not None, "a character has four bytes at most"


def reference(settings: Reasoning, tokens: list[int]) -> int | None:
    """Returns the forced token after `tokens`, computed from the whole text."""
    inside, place, text, entered = settings.is_open, 0, b"", 0
    queue: list[int] = []
    is_behind = False
    for count, token in enumerate([-1, *tokens]):
        if queue and token >= 0:
            assert token == queue.pop(0)
            if not queue:
                inside, place, text = False, 0, b""
            continue
        text += WORDS[token].removeprefix(b"\xff") if token >= 0 else b""
        while not is_behind:
            tag = END.encode() if inside else BEGIN.encode()
            at = text.find(tag, place)
            between = text[place : at if at >= 0 else None]
            if (
                not inside
                and not settings.repeats
                and between.strip()
                and (at >= 0 or not tag.startswith(between.strip()))
            ):
                is_behind = True
            if at < 0 or is_behind:
                break
            inside, place = not inside, at + len(tag)
            entered = count if inside else entered
        spent = count - entered
        if inside and settings.budget is not None and spent >= settings.budget:
            tail = text[place:]
            if not (_is_cut(tail) or tail.endswith((b"<", b"</", b"</t"))) or spent >= settings.budget + 3:
                queue = [*settings.forced]
    return queue[0] if queue else None


def _is_cut(data: bytes) -> bool:
    """Tells whether `data` ends within a character."""
    return any(
        len(text := (data[-cut:] + b"\x80" * more).decode("utf-8", "replace")) == 1 and text != "\ufffd"
        for cut in range(1, min(3, len(data)) + 1)
        for more in range(1, 4)
        if data[-cut] >= 0xC0 and cut + more <= 4
    )


@pytest.mark.parametrize("seed", range(SEED, SEED + 60))
def test_state_follows_from_settings_and_tokens(seed: int) -> None:
    source = Random(seed)
    settings = reasoning(source.randrange(9), is_open=source.random() < 0.7, repeats=source.random() < 0.5)
    state, tokens = ReasoningState(settings, WORDS), list[int]()
    common = [*range(len(WORDS) - len(PIECES), len(WORDS)), *ids(" \n<t/>ab")]
    for _ in range(60):
        assert state.forced == reference(settings, tokens), f"seed {seed}: after {[WORDS[token] for token in tokens]}"
        tokens.append(source.choice(common) if state.forced is None else state.forced)
        state.take(tokens[-1])
    again = ReasoningState(settings, WORDS)
    for token in tokens:
        again.take(token)
    assert (again.forced, again.is_inside) == (state.forced, state.is_inside)


@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_tags_are_found_however_tokens_divide_them(seed: int) -> None:
    source = Random(seed)
    text = b"".join(source.choices([b"<t>", b"</t>", b"a", b" ", b"<", b"</t"], k=12))
    places = set()
    for _ in range(5):
        state, left = ReasoningState(reasoning(None, is_open=False, repeats=True), WORDS), text
        while left:
            word = source.choice([word for word in WORDS if left.startswith(word)])
            state.take(WORDS.index(word))
            left = left[len(word) :]
        places.add(state.is_inside)
    assert len(places) == 1, f"seed {seed}"


class CountedBytes(bytes):
    """Bytes that count the bytes copied from all instances."""

    copied = 0

    def __radd__(self, before: bytes) -> CountedBytes:
        return CountedBytes(bytes(before) + bytes(self))

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        if isinstance(part, int):
            return part
        CountedBytes.copied += len(part)
        return CountedBytes(part)


@pytest.mark.parametrize("repeats", [False, True])
def test_many_tags_are_read_in_linear_time(repeats: bool) -> None:
    scanner, before = ReasoningScanner(reasoning(None, is_open=False, repeats=repeats)), CountedBytes.copied
    scanner.feed(CountedBytes(b"<t></t>" * 1000))
    assert scanner.begun == 1000 and scanner.place is Place.BEFORE
    assert CountedBytes.copied - before < 7000


def matcher(settings: Reasoning, grammar: Grammar | None = None) -> ReasoningMatcher:
    made = answer_matcher(MatcherStart(1, grammar, (), settings), VOCABULARY)
    assert isinstance(made, ReasoningMatcher)
    return made


def said(made: ReasoningMatcher, text: str) -> str:
    """Returns the answer of a model that writes `text`, with the first allowed token in place of each refused one."""
    result = ""
    for token in ids(text):
        allowed = made.try_take(token)
        if allowed is not None:
            token = min(token_set(allowed))
            made.take((token,))
        result += chr(token)
    return result


def test_only_the_forced_token_is_allowed() -> None:
    made = matcher(reasoning(2))
    assert said(made, "abcdef") == "ab</t>"
    assert made.allowed() is None and made.position == 6


def test_forced_tokens_come_together_and_the_answer_goes_on() -> None:
    made = matcher(reasoning(2))
    made.take(ids("ab"))
    assert made.is_complete and made.forced() == [*ids(END)]
    assert not made.is_complete and made.forced() == []
    long = Reasoning((BEGIN,), (END,), ids("x" * MAX_FORCED_TOKENS + END), 0, is_open=True)
    made = matcher(long)
    assert made.forced() == [*ids("x" * MAX_FORCED_TOKENS)] and made.forced() == [*ids(END)]


def test_the_rest_of_the_forced_end_is_peeked_at() -> None:
    made = matcher(reasoning(2))
    made.take(ids("a"))
    assert made.peek_forced() == []
    made.take(ids("b"))
    assert made.peek_forced() == [*ids(END)] and made.position == 2
    made.take(ids(END[:1]))
    assert made.peek_forced() == [*ids(END[1:])]
    made.take(ids(END[1:]))
    assert made.peek_forced() == []
    delayed = matcher(reasoning(1, delays=True), JSON)
    delayed.take(ids("a" + END))
    assert delayed.peek_forced() == [*ids("{")]


def test_a_grammar_begins_behind_the_reasoning_that_delays_it() -> None:
    made = matcher(reasoning(4, delays=True), JSON)
    assert said(made, "a{b}cccc!abc!") == "a{b}</t>{abc}"
    assert made.is_complete
    made = matcher(reasoning(None, delays=True), JSON)
    made.take((*ids("ab<"), *ids("/"), piece(b"t>")))
    assert token_set(made.allowed()) == {*ids("{")}


def test_white_space_of_the_end_tags_token_is_no_part_of_the_grammar() -> None:
    made = matcher(reasoning(None, delays=True), JSON)
    made.take(ids("ab</t"))
    assert made.try_take(piece(b"> ")) is None
    assert token_set(made.allowed()) == {*ids("{")}


@pytest.mark.parametrize("text", ["", "a", "abc", "ab</"])
def test_no_answer_ends_before_the_grammar_that_reasoning_delays(text: str) -> None:
    made = matcher(reasoning(None, delays=True), JSON)
    made.take(ids(text))
    allowed = made.try_take(VOCABULARY.end_ids[0])
    assert allowed is not None and not token_set(allowed) & {*VOCABULARY.end_ids}
    assert made.position == len(text) and made.try_take(ids("a")[0]) is None
    free = matcher(reasoning(None, delays=True), None)
    assert free.try_take(VOCABULARY.end_ids[0]) is None


def test_no_token_runs_over_the_end_of_reasoning_that_delays_a_grammar() -> None:
    made = matcher(reasoning(None, delays=True), JSON)
    made.take(ids("ab</t"))
    allowed = made.try_take(piece(b">{"))
    refused = {piece(b">{"), *VOCABULARY.end_ids}
    assert allowed is not None and token_set(allowed) & {*range(len(WORDS))} == {*range(len(WORDS))} - refused
    assert made.position == 5
    free = matcher(reasoning(None), None)
    free.take(ids("ab</t"))
    assert free.try_take(piece(b">{")) is None


class CountedWords(list[bytes]):
    reads = 0

    def __iter__(self) -> Iterator[bytes]:
        for word in super().__iter__():
            self.reads += 1
            yield word


def test_a_vocabulary_is_read_once_for_a_tag_and_not_while_tokens_are_sampled() -> None:
    words = CountedWords(WORDS)
    vocabulary = GrammarVocabulary(words, [len(WORDS) - 1], lambda text: [*text.encode()])
    start = MatcherStart(1, JSON, (), reasoning(None, delays=True))
    first = answer_matcher(start, vocabulary)
    first.take(ids("ab</t"))
    words.reads = 0
    assert first.try_take(piece(b">{")) is not None
    answer_matcher(start, vocabulary)
    assert words.reads == 0


@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_all_words_that_may_run_over_a_tag_are_found(seed: int) -> None:
    source = Random(seed)
    words = [bytes(source.choices(b"<aa> b", k=source.randrange(1, 7))) for _ in range(200)]
    tags = source.sample(["<a>", "a>", "aa", "<", "b<a>"], k=2)
    settings = Reasoning(("<t>",), tuple(tags), (), None, is_open=True)
    state = ReasoningState(settings, words)
    found = {token for tag in tags for token in may_run_over(words, tag.encode())}
    for _ in range(20):
        assert {token for token in range(len(words)) if state.runs_over(token)} <= found, f"seed {seed}: {tags}"
        state.take(source.randrange(len(words)))
        state = state if state.is_inside else ReasoningState(settings, words)


def test_a_trigger_in_delaying_reasoning_starts_no_grammar() -> None:
    lazy = definitions.lazy(JSON, ["{"])
    made = matcher(reasoning(4, delays=True), lazy)
    assert said(made, "{aaa    x{abc!") == "{aaa</t>x{abc}"
    made = matcher(reasoning(4), lazy)
    assert said(made, "{abc!") == "{abc}", "where it delays nothing, the trigger counts"


def test_a_grammar_that_has_reasoning_as_a_part_takes_the_forced_end() -> None:
    grammar = definitions.of_lark('start: thoughts "{" /[a-f]{3}/\nthoughts[suffix="</t>"]: /(?s:.*)/', "tools")
    made = matcher(reasoning(3), grammar)
    assert said(made, "xyz    !abc") == "xyz</t>{abc"


def test_a_grammar_that_does_not_allow_the_end_makes_the_budget_ineffective() -> None:
    made = matcher(reasoning(2), definitions.of_regex("[a-f]{6}", "guided_regex"))
    made.take(ids("ab"))
    assert made.forced() == [] and said(made, "cdef") == "cdef"


def test_errors_of_the_grammar_reach_the_caller() -> None:
    made = matcher(reasoning(None, is_open=False), JSON)
    with pytest.raises(RequestError, match="does not allow token"):
        made.take(ids("a"))
    with pytest.raises(RequestError, match="cannot be used"):
        matcher(reasoning(2), Grammar('{"grammars": [{"lark_grammar": "start: nothing"}]}'))


@pytest.mark.parametrize("seed", range(SEED, SEED + 20))
def test_random_answers_can_be_built_again(seed: int) -> None:
    """Checks answers with and without a grammar, which may be lazy, from any prefix of their tokens."""
    source = Random(seed)
    delays = source.random() < 0.7
    grammar = source.choice([None, JSON, definitions.lazy(JSON, ["{"])]) if delays else None
    settings = reasoning(source.randrange(6), is_open=grammar is JSON or source.random() < 0.6, delays=delays)
    made, tokens, sets = matcher(settings, grammar), list[int](), list[object]()
    for _ in range(40):
        allowed = made.allowed()
        sets.append(allowed if allowed is None else frozenset(token_set(allowed)))
        pool = sorted(token_set(allowed)) if allowed is not None else [*ids("<t/>{ab "), *range(128, len(WORDS) - 1)]
        token = source.choice(pool)
        if (refused := made.try_take(token)) is not None:
            token = source.choice(sorted(token_set(refused) & {*range(len(WORDS) - 1)}))
            made.take((token,))
        tokens.append(token)
    for place in source.sample(range(len(sets)), min(8, len(sets))):
        again = matcher(settings, grammar)
        again.take(tokens[:place])
        allowed = again.allowed()
        found = allowed if allowed is None else frozenset(token_set(allowed))
        assert found == sets[place], f"seed {seed}: after {place} of {tokens}"


def test_a_plain_grammar_has_its_own_matcher() -> None:
    assert isinstance(answer_matcher(MatcherStart(1, JSON, ()), VOCABULARY), GrammarMatcher)
