"""Tests of tokenizer rules with made-up vocabularies: word types, end of generation, damaged fields, unusual texts."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.model.tokenizers import word_finder
from llamaclust.model.tokenizers.byte_pairs import _BYTE_OF, stand_ins
from llamaclust.model.tokenizers.fill_in import FillInTokens
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.pre_tokenizers import _BY_NAME
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer
from llamaclust.model.tokenizers.vocabulary import TokenType, read_vocabulary
from support.models.tiny_tokenizers import byte_level, spaced_byte_pairs, word_pieces

CONTROL, USER_DEFINED, BYTE = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE


def spm(words: dict[str, int] | None = None, scores: dict[str, float] | None = None, **fields: Any) -> dict[str, Any]:
    """Returns metadata of a SentencePiece vocabulary: unknown, BOS, EOS, 256 bytes, then `words` with their types."""
    every = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)} | (words or {})
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(every),
        "tokenizer.ggml.token_type": np.array(list(every.values()), np.int32),
        "tokenizer.ggml.scores": np.array([(scores or {}).get(word, 0.0) for word in every], np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def bpe(merges: list[str] | None = None, words: dict[str, int] | None = None, **fields: Any) -> dict[str, Any]:
    """Returns metadata of a byte-level vocabulary: 256 byte letters, merged words, then `words` with their types."""
    made = ["".join(merge.split(" ")) for merge in merges or []]
    every = dict.fromkeys([*_BYTE_OF, *made], 1) | (words or {})
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(every),
        "tokenizer.ggml.token_type": np.array(list(every.values()), np.int32),
        "tokenizer.ggml.merges": merges or [],
    } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def words_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in ids]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    words = dict.fromkeys(["a", "b", "ab", "bb", "▁"], 1)
    tokenizer = load_tokenizer(spm(words, {"ab": -2.0, "bb": -1.0}))
    assert words_of(tokenizer, tokenizer.encode("abbé")) == ["<s>", "▁", "a", "bb", "<0xC3>", "<0xA9>"]
    tokenizer = load_tokenizer(spm(words, {"ab": -1.0, "bb": -2.0}))
    assert words_of(tokenizer, tokenizer.encode("abbé")) == ["<s>", "▁", "ab", "b", "<0xC3>", "<0xA9>"]


def test_sentencepiece_space_prefix_is_the_files_choice_and_spaces_are_kept() -> None:
    words = dict.fromkeys(["a", "▁", "▁a"], 1)
    tokenizer = load_tokenizer(spm(words, add_space_prefix=False, add_bos_token=False))
    assert words_of(tokenizer, tokenizer.encode("a  a ")) == ["a", "▁", "▁a", "▁"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"
    tokenizer = load_tokenizer(spm(words, add_bos_token=False, add_eos_token=True))
    assert words_of(tokenizer, tokenizer.encode("a")) == ["▁a", "</s>"]


def test_user_defined_words_are_always_found_and_the_longest_wins() -> None:
    for metadata in (spm({"<t>": USER_DEFINED, "<t><t>": USER_DEFINED, "▁": 1, "a": 1}, add_space_prefix=False), bpe()):
        if metadata["tokenizer.ggml.model"] == "gpt2":
            metadata = bpe(words={"<t>": USER_DEFINED, "<t><t>": USER_DEFINED})
        tokenizer = load_tokenizer(metadata)
        found = words_of(tokenizer, tokenizer.encode("a<t><t><t>a", add_special=False))
        assert found == ["a", "<t><t>", "<t>", "a"]
        assert tokenizer.decode(tokenizer.encode("a<t>a"), skip_special=True) == "a<t>a"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_text_becomes_a_control_token(kind: str) -> None:
    """Checks that text stays text although merges form the token, or llama-bpe matches whole words."""
    if kind == "llama":
        tokenizer = load_tokenizer(spm(dict.fromkeys(["▁", "s", "t", "st", "o", "p", "op"], 1) | {"stop": CONTROL}))
    else:
        tokenizer = load_tokenizer(bpe(["s t", "o p", "st op"], {"stop": CONTROL}, pre="llama-bpe"))
    plain = tokenizer.encode("stop", add_special=False)
    assert not any(tokenizer.is_control(token_id) for token_id in plain)
    assert tokenizer.decode(plain) == "stop"
    parsed = tokenizer.encode("stop", add_special=False, parse_special=True)
    assert words_of(tokenizer, parsed) == ["stop"]


def test_whole_words_of_the_vocabulary_are_not_merged_in_llama_3_models() -> None:
    merges, words = ["a b", "c d"], {"abcd": 1}
    assert words_of(load_tokenizer(bpe(merges, words)), load_tokenizer(bpe(merges, words)).encode("abcd")) == [
        "ab",
        "cd",
    ]
    tokenizer = load_tokenizer(bpe(merges, words, pre="llama-bpe"))
    assert words_of(tokenizer, tokenizer.encode("abcd")) == ["abcd"]


def test_end_of_generation_by_key_and_by_text() -> None:
    words = {"<|im_end|>": 1, "<|eom_id|>": CONTROL, "stop": 1}
    tokenizer = load_tokenizer(bpe(words=words, eos_token_id=5, eot_token_id=256 + 2))
    found = words_of(tokenizer, sorted(tokenizer.end_of_generation))
    assert found == [tokenizer.token_text(5), "<|im_end|>", "<|eom_id|>", "stop"]
    assert tokenizer.is_control(256), "a word that looks like a control token is one, whatever the file says"
    assert tokenizer.encode("<|im_end|>") != [256]


def test_end_marks_inside_an_answer_do_not_end_it() -> None:
    words: dict[str, int] = {"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL, "<|channel|>": CONTROL}
    tokenizer = load_tokenizer(bpe(words=words))
    assert set(words_of(tokenizer, list(tokenizer.end_of_generation))) == {"<|return|>", "<|call|>"}
    assert not tokenizer.is_control(256) and not tokenizer.is_control(259)
    alone = load_tokenizer(bpe(words={"<|end|>": CONTROL}))
    assert alone.end_of_generation == {256}


def test_marks_of_a_chat_are_control_texts() -> None:
    words = {"<|start|>": CONTROL, "<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL, "<|message|>": 1}
    tokenizer = load_tokenizer(bpe(words={**words, "<|tool_call>": USER_DEFINED, "<tool_call>": USER_DEFINED}))
    assert {*tokenizer.control_texts} == {*words, "<|tool_call>"}
    assert words_of(tokenizer, tokenizer.encode("<|start|><tool_call>")) == ["<|start|>", "<tool_call>"]


@pytest.mark.parametrize("name", ["Phi-3 mini", "phi3", "Phi-4", None])
def test_white_space_behind_special_tokens_is_ignored_by_phi_3(name: str | None) -> None:
    words: dict[str, int] = dict.fromkeys(["▁", "a", "\n"], 1) | {"<|user|>": CONTROL, "<|endoftext|>": CONTROL}
    stated = {} if name is None else {"general.name": name}
    tokenizer = load_tokenizer(spm(words, {"▁a": 0.0}, add_bos_token=False) | stated)
    encoded = words_of(tokenizer, tokenizer.encode("<|user|>\n \ta<|endoftext|> a<|user|> \n", parse_special=True))
    if name in ("Phi-3 mini", "phi3"):
        assert encoded == ["<|user|>", "▁", "a", "<|endoftext|>", "▁", "▁", "a", "<|user|>"]
    else:
        assert len(encoded) > 12


def test_suppressed_tokens() -> None:
    words: dict[str, int] = {"<image|>": CONTROL, "<audio|>": CONTROL}
    stated = np.array([256, 257, 258, -1], np.int32)
    assert read_vocabulary(bpe(words=words, suppress_tokens=stated)).suppressed == {256, 257}
    assert read_vocabulary(bpe(words=words)).suppressed == frozenset()
    for wrong in (7, "<image|>", np.array([0.5]), np.zeros(257, np.int32)):
        with pytest.raises(ModelFileError, match="suppress_tokens is not an array of at most 256 whole numbers"):
            read_vocabulary(bpe(words=words, suppress_tokens=wrong))


@pytest.mark.parametrize("few", [0, 64])
@settings(deadline=None)
@given(
    words=st.lists(st.text("<ab|>", min_size=1, max_size=5), unique=True, max_size=12),
    text=st.text("<ab|> \n", max_size=60),
)
def test_the_longest_special_words_are_found_first_wherever_they_are(few: int, words: list[str], text: str) -> None:
    """Compares with a search for each word, longest first, as llama.cpp does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_finder, "_FEW", few)
        tokenizer = load_tokenizer(bpe(words={f"{word} ": USER_DEFINED for word in words}))
    expected: list[str | int] = [text] if text else []
    for word, token_id in sorted(
        ((f"{word} ", 256 + n) for n, word in enumerate(words)), key=lambda w: (-len(w[0]), w[1])
    ):
        parts, expected = expected, []
        for part in parts:
            pieces: list[str | int] = [*part.split(word)] if isinstance(part, str) else [part]
            for index, piece in enumerate(pieces):
                expected += ([token_id] if index else []) + ([piece] if piece or isinstance(piece, int) else [])
    assert tokenizer.split_special(text, parse_special=False) == expected


def test_tokens_around_a_gap_by_key_and_by_text() -> None:
    words = {"<PRE>": USER_DEFINED, "<SUF>": 1, "<mid>": USER_DEFINED, "<file>": CONTROL, "<REPO>": 1}
    tokenizer = load_tokenizer(bpe(words=words, fim_mid_token_id=258, fim_sep_token_id=259))
    assert tokenizer.vocabulary.fill_in == FillInTokens(256, 257, 258, repository=260, file=259)
    assert tokenizer.end_of_generation == {259, 260}
    assert len(tokenizer.encode("<PRE><SUF><mid>")) == 15, "a text never becomes one of these tokens"
    assert load_tokenizer(bpe(words=words)).vocabulary.fill_in is None


def test_special_ids_outside_the_vocabulary_count_as_none() -> None:
    tokenizer = load_tokenizer(bpe(bos_token_id=2**32 - 1, eos_token_id=256, add_bos_token=True))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, None, False)
    assert tokenizer.encode("a") == [tokenizer.token_id("a")]


def test_unknown_token_ids_are_refused() -> None:
    tokenizer = load_tokenizer(bpe())
    for token_id in (-1, 256, 1 << 40):
        with pytest.raises(RequestError, match=r"outside the vocabulary \[0, 256\)"):
            tokenizer.decode([token_id])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "the file has no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "a tokenizer of kind 'rwkv'; supported kinds are llama, gpt2, t5, bert"),
        (bpe(pre="martian"), "unknown pre-tokenizer 'martian'"),
        (bpe(tokens=["a", "b", "a"], token_type=None), "tokens 0 and 2 are both 'a'"),
        (bpe(tokens=[]), "tokens is empty"),
        (bpe(tokens=["a", "b" * 4097]), "a token of 4097 characters, more than 4096"),
        (bpe(tokens="abc"), "not an array of text"),
        (bpe(tokens=[1, 2]), "not an array of text"),
        (bpe(token_type=np.array([1, 1], np.int32)), "must be an array of 256 numbers"),
        (bpe(token_type=["1"] * 256), "not an array of whole numbers"),
        (bpe(token_type=np.ones(256, np.float32)), "not an array of whole numbers"),
        (bpe(merges=["ab"]), "'ab' is not two words"),
        (bpe() | {"tokenizer.ggml.merges": None}, "merges is missing"),
        (bpe(bos_token_id="x"), "bos_token_id is not a whole number"),
        (bpe(add_bos_token=1), "add_bos_token is not a Boolean"),
        (spm({"<0x1>": BYTE}), "not <0xNN>"),
        (spm({"a": 1}, scores_extra=1) | {"tokenizer.ggml.scores": np.zeros(3, np.float32)}, "must be an array of 260"),
    ],
)
def test_bad_fields_are_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_tokenizer(metadata)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabularies_that_lack_the_usual_still_work() -> None:
    bare = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b", ""]}
    tokenizer = load_tokenizer(bare)
    assert tokenizer.encode("abc") == [0, 1]
    assert tokenizer.token_text(2) == "[EMPTY_2]"
    two_unknown = {"tokenizer.ggml.token_type": np.array([2, 2, 1])}
    assert load_tokenizer(bare | two_unknown).encode("b", add_special=False) == [0]
    lone_byte = {"tokenizer.ggml.tokens": ["<unk>", "a", "<0x41>"], "tokenizer.ggml.token_type": np.array([2, 1, 6])}
    tokenizer = load_tokenizer(bare | lone_byte)
    assert tokenizer.token_bytes(2) == b"A"


def test_numbers_after_the_last_token_are_not_read() -> None:
    numbers = {"scores": np.zeros(1 << 20, np.float32), "token_type": np.ones(1 << 20, np.uint8)}
    metadata = {"tokenizer.ggml.tokens": ["<unk>", "a", "b"]} | {
        f"tokenizer.ggml.{name}": values for name, values in numbers.items()
    }
    tracemalloc.start()
    try:
        vocabulary = read_vocabulary(metadata)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert vocabulary.scores == [0.0] * 3 and vocabulary.types == bytes([TokenType.NORMAL] * 3)


OUTSIDE = {
    "Ġ世界": 1,
    "\x7f\x80\xa0\xad": 1,
    "é\u0143": 1,
    "\uffff": 1,
    "": 1,
    "▁a": 5,
    "<é>": 3,
    "<ü>": 4,
    "ª\u0100Ġ": 0,
}
"""Words with letters that stand for no byte (Latin-1 and others), and of types that are written unchanged."""


@pytest.mark.parametrize(
    "metadata", [spm(OUTSIDE), bpe(["a b", "Ġ é"], OUTSIDE), spaced_byte_pairs(400), word_pieces(300), byte_level(600)]
)
def test_bytes_of_all_tokens_are_those_of_each(metadata: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(metadata)
    words = tokenizer.all_bytes()
    assert words == [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocabulary_size)]
    letters = stand_ins()
    if metadata["tokenizer.ggml.model"] == "gpt2":
        spelled = [
            b"".join(letters.get(letter) or letter.encode() for letter in word) for word in tokenizer.vocabulary.words
        ]
        assert [word for word, kind in zip(words, tokenizer.vocabulary.types, strict=True) if kind in (0, 1, 5)] == [
            word for word, kind in zip(spelled, tokenizer.vocabulary.types, strict=True) if kind in (0, 1, 5)
        ]


def test_merges_of_words_that_are_missing_are_left_out() -> None:
    metadata = bpe(["a b"])
    metadata["tokenizer.ggml.merges"] = ["a b", "ab zz", "q q"]
    tokenizer = load_tokenizer(metadata)
    assert words_of(tokenizer, tokenizer.encode("abqq")) == ["ab", "q", "q"]


@pytest.mark.parametrize("name", sorted(_BY_NAME))
def test_every_pre_tokenizer_keeps_every_character(name: str) -> None:
    tokenizer = load_tokenizer(bpe(pre=name))
    text = (
        "It's 12345 héllo's, Ǆ ｗide\t\r\n\n  世界가나ᾼΩ!!! ...\u3000'LL x\u0301 🦙 def f(x):\n    return 1\u2028end  "
    )
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "It's 1234  ok", ["It", "'s", "Ġ1234", "Ġ", "Ġok"]),
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("llama-bpe", "IT'S 1234!\n\nok", ["IT", "'S", "Ġ", "123", "4", "!ĊĊ", "ok"]),
        ("qwen2", "x 12", ["x", "Ġ", "1", "2"]),
        ("deepseek-llm", "ab\ncd 12", ["ab", "Ċ", "cd", "Ġ", "12"]),
        ("falcon", "a1234+b", ["a", "123", "4", "+", "b"]),
        ("tekken", "HelloWorld/", ["Hello", "World", "/"]),
        ("gpt-4o", "We're 1234", ["We're", "Ġ", "123", "4"]),
        ("kimi-k2", "We're 1234世ok!\n", ["We're", "Ġ", "123", "4", "ä¸ĸ", "ok", "!Ċ"]),
    ],
)
def test_where_the_pre_tokenizers_cut(name: str, text: str, pieces: list[str]) -> None:
    """Checks pieces with a vocabulary of all two-symbol merges, so that each piece becomes one token."""
    merges: list[str] = []
    for piece in pieces:
        merges += [f"{piece[:i]} {piece[i]}" for i in range(1, len(piece)) if f"{piece[:i]} {piece[i]}" not in merges]
    tokenizer = load_tokenizer(bpe(merges, pre=name))
    assert words_of(tokenizer, tokenizer.encode(text, add_special=False)) == pieces


WORDS = dict.fromkeys(["a", "b", "▁", "▁a", "é", "é▁", "世", "<", "x"], 1) | {"<x>": USER_DEFINED}
RANDOM = {
    "llama": load_tokenizer(spm(WORDS, {"▁a": -1.0, "é▁": -2.0}, add_bos_token=False)),
    "gpt2": load_tokenizer(bpe(["a b", "Ġ a", "Ã ©"], {"<x>": USER_DEFINED}, pre="smollm")),
}


@pytest.mark.parametrize("kind", RANDOM)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab é世<x>🦙\n\t\0▁ \ufdd0") | st.characters(), max_size=40))
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = RANDOM[kind]
    ids = tokenizer.encode(text)
    readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    first, *rest = readable.split("<x>")
    if kind == "llama":
        first = first.replace("▁", " ")
        rest = [part and " " + part.replace("▁", " ") for part in rest]
    assert tokenizer.decode(ids) == "<x>".join([first, *rest])
    stream = Detokenizer(tokenizer, text_start=True)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", RANDOM)
def test_any_tokens_read_the_same_one_by_one(kind: str) -> None:
    tokenizer = RANDOM[kind]
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(200):
        ids = [draw.randrange(tokenizer.vocabulary_size) for _ in range(draw.randrange(12))]
        for skip in (False, True):
            stream = Detokenizer(tokenizer, skip, text_start=True)
            assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("unit", [" ", "a", "\n", " \n", "é ", "<x>"])
def test_long_monotonous_texts_are_quick(kind: str, unit: str) -> None:
    tokenizer = RANDOM[kind]
    text = unit * (200_000 // len(unit)) + "b"
    assert tokenizer.decode(tokenizer.encode(text)).endswith("b")


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    ("metadata", "bos", "eos"),
    [
        (spm({"a": 1}), "<s>", "</s>"),
        (bpe(words={"<|start|>": 3, "<|end|>": 3}, bos_token_id=256, eos_token_id=257), "<|start|>", "<|end|>"),
        (bpe(words={"<bos>": 4, "<eos>": 4}, bos_token_id=256, eos_token_id=257), "<bos>", "<eos>"),
    ],
)
def test_special_tokens_that_the_text_spells_are_not_doubled(
    metadata: dict[str, Any], bos: str, eos: str, *, begins: bool, ends: bool
) -> None:
    flags = {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    tokenizer = load_tokenizer(metadata | flags)
    plain = tokenizer.encode("a", parse_special=True)
    body = tokenizer.encode("a", add_special=False)
    assert plain == [*[tokenizer.bos_id] * begins, *body, *[tokenizer.eos_id] * ends]
    spelled = [tokenizer.bos_id, *body, tokenizer.eos_id]
    assert tokenizer.encode(f"{bos}a{eos}", parse_special=True) == spelled
    assert tokenizer.encode(f"{bos}{bos}a{eos}", parse_special=True) == [tokenizer.bos_id, *spelled]
