"""Compares token ids with llama.cpp's for the vocabularies and test strings that it publishes."""

from __future__ import annotations

import time
from functools import cache

import pytest

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer
from support.paths import DATA

DATA_FOLDER = DATA / "tokenizers"
VOCABULARIES = ("gpt-2", "llama-bpe", "llama-spm")
SEPARATOR = "\n__ggml_vocab_test__\n"


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return load_tokenizer(open_model(DATA_FOLDER / f"ggml-vocab-{name}.gguf").metadata)


def vectors(name: str) -> list[tuple[str, list[int]]]:
    stem = DATA_FOLDER / f"ggml-vocab-{name}.gguf"
    texts = stem.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)[:-1]
    lines = stem.with_suffix(".gguf.out").read_text().split("\n")[:-1]
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    cases = vectors(name)
    assert len(cases) == 46
    tokenizer = tokenizer_of(name)
    wrong = [text for text, ids in cases if tokenizer.encode(text, add_special=False) != ids]
    assert wrong == []


@pytest.mark.parametrize("name", VOCABULARIES)
def test_detokenizing_gives_the_text_back(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert [tokenizer.decode(ids) for _, ids in vectors(name)] == [text for text, _ in vectors(name)]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_stream_of_tokens_reads_the_same_and_never_shows_half_a_character(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text, ids in vectors(name):
        stream = Detokenizer(tokenizer, text_start=True)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == text


def test_a_vocabulary_of_128_thousand_words_takes_linear_time() -> None:
    metadata = open_model(DATA_FOLDER / "ggml-vocab-llama-bpe.gguf").metadata
    start = time.process_time()
    load_tokenizer(metadata).encode("first use")
    assert time.process_time() - start < 20  # about 1 s on a fast machine; minutes if it were quadratic


@pytest.mark.parametrize(
    ("name", "bos", "eos", "ends", "adds_bos"),
    [
        ("gpt-2", 50256, 50256, {50256}, False),
        ("llama-bpe", 128000, 128001, {128001, 128009}, True),
        ("llama-spm", 1, 2, {2}, True),
    ],
)
def test_special_tokens(name: str, bos: int, eos: int, ends: set[int], adds_bos: bool) -> None:
    tokenizer = tokenizer_of(name)
    assert (tokenizer.bos_id, tokenizer.eos_id, set(tokenizer.end_of_generation)) == (bos, eos, ends)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (adds_bos, False)
    assert tokenizer.is_control(bos)
    assert tokenizer.encode("") == ([bos] if adds_bos else [])


def test_control_words_in_a_text_stay_text_unless_they_are_asked_for() -> None:
    tokenizer = tokenizer_of("llama-bpe")
    text = "a<|eot_id|>b<|begin_of_text|>"
    plain = tokenizer.encode(text, add_special=False)
    assert not any(tokenizer.is_control(token_id) for token_id in plain)
    assert tokenizer.decode(plain) == text
    a, b = tokenizer.encode("a", add_special=False), tokenizer.encode("b", add_special=False)
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    assert parsed == [*a, 128009, *b, 128000]
    assert tokenizer.decode(parsed) == text
    assert tokenizer.decode(parsed, skip_special=True) == "ab"


def test_a_space_goes_before_text_that_follows_a_special_token_in_sentencepiece_models() -> None:
    tokenizer = tokenizer_of("llama-spm")
    hello = tokenizer.token_id("▁Hello")
    assert hello is not None
    assert tokenizer.encode("Hello</s>Hello", parse_special=True) == [1, hello, 2, hello]
    assert tokenizer.decode([1, hello, 2, hello], skip_special=True) == "Hello Hello"
    assert Detokenizer(tokenizer).push(hello) == " Hello"


def test_bytes_that_are_no_text_become_replacement_characters_at_the_end_only() -> None:
    tokenizer = tokenizer_of("llama-spm")
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in "🦙".encode()]
    stream = Detokenizer(tokenizer)
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "🦙"]
    assert [stream.push(token_id) for token_id in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert tokenizer.decode_bytes(ids[:2]) == "🦙".encode()[:2]
