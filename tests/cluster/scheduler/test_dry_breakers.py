"""Tests of DRY sequence breakers: all token sequences with a text, found by an index, sent where they can matter."""

from __future__ import annotations

import random

import pytest

from llamaclust.cluster.scheduler.dry_breakers import BreakerTokens, SeenBreakers
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_BREAKERS_TOKENS
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.paths import DATA
from support.seed import SEED


class Words:
    """A minimal tokenizer: its tokens are words, and a text is encoded as letters."""

    words: tuple[bytes, ...] = (b"a", b"b", b"ab", b"x a", b"\n\n", "\u00e9".encode()[:1], b"c")
    vocabulary_size = len(words)

    def token_bytes(self, token: int) -> bytes:
        return self.words[token]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [self.words.index(letter.encode()) for letter in text]


def test_dry_breakers_are_all_token_sequences_with_the_text() -> None:
    tokens = BreakerTokens(Words())  # type: ignore[arg-type]
    assert tokens.of(["\n"]) == {4: ((4,),)}
    assert tokens.of(["ab"]) == {0: ((0, 1),), 2: ((2,),), 3: ((3, 1),)}
    assert tokens.of(["ab", "abc", "b"]) == {
        0: ((0, 1), (0, 1, 6)),
        1: ((1,),),
        2: ((2,), (2, 6)),
        3: ((3, 1), (3, 1, 6)),
    }
    assert tokens.of(["\u00e9"]) == {}, "half a character has no rest"


def test_only_breakers_that_occurred_are_looked_for() -> None:
    seen = SeenBreakers({4: ((4,),), 0: ((0, 1),)}, [3, 0, 0])
    assert seen.sequences == ((0, 1),)
    seen.add(4)
    seen.add(4)
    assert list(seen.sequences) == [(0, 1), (4,)]


def test_dry_breakers_whose_first_tokens_have_not_all_occurred_are_not_sent() -> None:
    """Such breakers are neither in the tokens nor completed by the next one."""
    seen = SeenBreakers({4: ((4, 5, 6), (4, 4, 9)), 7: ((7, 8),)}, [3, 4])
    assert list(seen.sequences) == [(4, 4, 9)]
    seen.add(5)
    assert list(seen.sequences) == [(4, 4, 9), (4, 5, 6)]
    seen.add(7)
    assert list(seen.sequences) == [(4, 4, 9), (4, 5, 6), (7, 8)]


def by_plain_search(tokenizer: Tokenizer, text: str) -> set[tuple[int, ...]]:
    """Returns breakers by llama.cpp's definition: each token is compared with each beginning of the text."""
    whole, found = text.encode(), set[tuple[int, ...]]()
    for token in range(tokenizer.vocabulary_size):
        word = tokenizer.token_bytes(token)
        if whole in word:
            found.add((token,))
            continue
        for cut in range(1, min(len(word), len(whole) - 1) + 1):
            if word.endswith(whole[:cut]):
                try:
                    rest = tokenizer.encode(whole[cut:].decode(), add_special=False)
                except UnicodeDecodeError:
                    continue
                found.add((token, *rest))
    return found


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_the_index_finds_what_a_plain_search_finds(name: str) -> None:
    tokenizer = load_tokenizer(open_model(DATA / "tokenizers" / f"ggml-vocab-{name}.gguf").metadata)
    breakers = BreakerTokens(tokenizer)
    random_ = random.Random(SEED)
    letters = 'zqxjkvw \n:*"{}\u00e9\u4e2d'
    texts = ["\n", "*", "####", "\n\n", "\u4e2d\u6587", "Zz", "</s>"]
    texts += ["".join(random_.choices(letters, k=random_.randint(2, 8))) for _ in range(5)]
    for text in texts:
        found = [sequence for sequences in breakers.of([text]).values() for sequence in sequences]
        assert len(set(found)) == len(found)
        assert set(found) == by_plain_search(tokenizer, text), text


class CountingWords(Words):
    """A tokenizer that counts its calls."""

    looked_up = encoded = 0

    def token_bytes(self, token: int) -> bytes:
        self.looked_up += 1
        return super().token_bytes(token)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        self.encoded += 1
        return super().encode(text, add_special)


def test_a_text_does_not_cost_a_walk_through_the_vocabulary() -> None:
    words = CountingWords()
    breakers = BreakerTokens(words)  # type: ignore[arg-type]
    for number in range(64):
        breakers.of(["a" + "bc" * (1 + number % 7), "ccc" + "a" * number])
    assert words.looked_up == words.vocabulary_size
    words.encoded = 0
    breakers.of(["ab" * 20])
    assert words.encoded == 2, "of 39 rests, those behind a beginning that some word ends with"


class ManyWords(Words):
    words = tuple(b"%dx" % number for number in range(MAX_BREAKERS_TOKENS + 1))
    vocabulary_size = len(words)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [0] * len(text)


@pytest.mark.parametrize("texts", [["x"], ["xy"], ["x0", *"0123456789"]])
def test_too_many_sequences_are_refused_before_all_are_made(texts: list[str]) -> None:
    with pytest.raises(ParameterError, match=rf"dry_sequence_breakers.*the limit is {MAX_BREAKERS_TOKENS}"):
        BreakerTokens(ManyWords()).of(texts)  # type: ignore[arg-type]
