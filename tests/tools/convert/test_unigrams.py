"""Checks that SentencePiece unigram vocabularies give the token ids of the training library, and that character maps
are validated before use."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.sentence_pieces import check_charsmap
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.probe import PROBE
from llamaclust.tools.convert.vocabularies.reading import read_words
from llamaclust.tools.convert.vocabularies.words import Words
from support.paths import DATA

TEXT = DATA / "text/wiki.test.head.raw"
TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "Ａ①㍿ ﬁ ½ é e\u0301",
    "a<tool>b <tool> c",
    "\n\nlines\r\n\tand tabs\u00a0",
    "\0\u200d🦙",
    *PROBE.splitlines(),
]


@cache
def trained(**how: Any) -> bytes:
    """Trains a vocabulary of 400 pieces."""
    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "unigram",
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    lines = iter(TEXT.read_text().splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options | how)
    return model.getvalue()


def read(data: bytes, folder: Path, said: dict[str, Any] | None = None) -> Words:
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(said or {}))
    rows = len(sentencepiece_model_pb2.ModelProto.FromString(data).pieces)
    with SourceFiles() as files:
        return read_words(files, folder, rows)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"byte_fallback": True, "user_defined_symbols": "<tool>"},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"normalization_rule_name": "nfkc_cf", "byte_fallback": True, "remove_extra_whitespaces": False},
    ],
    ids=["plain", "bytes", "as it is", "folded"],
)
def test_ids_are_those_of_the_library(how: dict[str, Any], tmp_path: Path) -> None:
    data = trained(**how)
    words, library = read(data, tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = load_tokenizer(words.metadata())
    assert words.kind == "t5" and bool(words.charsmap) == (how.get("normalization_rule_name") != "identity")
    for text in TEXTS:
        wanted = library.EncodeAsIds(text)
        assert tokenizer.encode(text) == [1, *wanted], text
        assert tokenizer.encode(text, add_special=False) == wanted
        if "unk" not in {tokenizer.token_text(token_id).strip("<>") for token_id in wanted}:
            assert tokenizer.decode(wanted) == library.DecodeIds(wanted), text
    marked = tokenizer.encode("the end</s>of", parse_special=True)
    assert marked == [1, *library.EncodeAsIds("the end"), 2, *library.EncodeAsIds("of")]


def test_the_files_beside_it_say_what_is_added(tmp_path: Path) -> None:
    words = read(trained(), tmp_path, {"add_bos_token": False, "add_eos_token": True})
    assert load_tokenizer(words.metadata()).encode("the")[-1] == 2
    assert words.ids == {"unknown": 0, "bos": 1, "eos": 2} and not words.flags["add_bos_token"]


def test_maps_that_lead_astray_are_refused() -> None:
    """Checks that character maps with links out of the trie or with a wrong length are refused."""
    model = sentencepiece_model_pb2.ModelProto.FromString(trained(normalization_rule_name="nfkc"))
    good = model.normalizer_spec.precompiled_charsmap
    check_charsmap(good, "x")
    units = np.frombuffer(good, "<u4", int.from_bytes(good[:4], "little") // 4, 4)
    inner = int(np.flatnonzero((units >> 31 == 0) & (units >> 10 != 0))[0])
    leaf = int(np.flatnonzero(units >> 31)[-1])
    for unit, value in ((inner, units[inner] | 1 << 30), (leaf, 0xFFFFFFFF), (0, 0x7FFFFC00)):
        changed = bytearray(good)
        changed[4 + 4 * unit : 8 + 4 * unit] = int(value).to_bytes(4, "little")
        with pytest.raises(ModelFileError, match=r"leads outside|points outside"):
            check_charsmap(bytes(changed), "x")
    for bad in (good[:-1] + b"x", good[:100], b"\0" * 9, b"\xff" * 5000, good[: 4 + 4 * len(units)]):
        with pytest.raises(ModelFileError, match=r"a trie of .* do not fit"):
            check_charsmap(bad, "x")


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    metadata = read(trained(), tmp_path).metadata()
    scores = np.array(metadata["tokenizer.ggml.scores"])
    scores[7] = np.nan
    with pytest.raises(ModelFileError, match="expected numbers only"):
        load_tokenizer(metadata | {"tokenizer.ggml.scores": scores})
    with pytest.raises(ModelFileError, match="precompiled_charsmap is not an array of bytes"):
        load_tokenizer(metadata | {"tokenizer.ggml.precompiled_charsmap": "x"})


def library_form(data: bytes, spaces: str = " {2,}") -> dict[str, Any]:
    """Returns tokenizer.json as Hugging Face's library converts it from a unigram file."""
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    steps = [
        {"type": "Precompiled", "precompiled_charsmap": charsmap},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": spaces}, "content": "▁"},
    ]
    vocabulary = [[piece.piece, piece.score] for piece in model.pieces]
    fallback = bool(model.trainer_spec.byte_fallback)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {
        "added_tokens": [{"id": i, "content": text, **plain} for i, text in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": fallback},
    }


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_the_library_s_form_gives_the_same_ids(byte_fallback: bool, tmp_path: Path) -> None:
    data = trained(byte_fallback=byte_fallback)
    wanted = load_tokenizer(read(data, tmp_path).metadata())
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(library_form(data)))
    with SourceFiles() as files:
        tokenizer = load_tokenizer(read_words(files, tmp_path, wanted.vocabulary_size).metadata())
    for text in TEXTS:
        assert tokenizer.encode(text, add_special=False) == wanted.encode(text, add_special=False), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": None}, "unlike SentencePiece"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "unlike SentencePiece"),
        ({"model": {"vocab": [["a", 1, 2]]}}, "not a list of words with their scores"),
        ({"model": {"vocab": [["a", 1e99]]}}, "not a list of words with their scores"),
        ({"model": {"unk_id": None}}, "the piece for unknown text is missing"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "x!"}}, "map of characters is not base64"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "a trie of .* do not fit"),
    ],
)
def test_library_forms_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    said = library_form(trained())
    if "model" in change:
        change = {"model": said["model"] | change["model"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said | change))
    with pytest.raises(ModelFileError, match=message), SourceFiles() as files:
        read_words(files, tmp_path, 400)


@pytest.mark.parametrize("kind", ["char", "word"])
def test_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=f"of kind {kind.upper()} is not supported; supported: BPE, UNIGRAM"):
        read(trained(model_type=kind), tmp_path)
