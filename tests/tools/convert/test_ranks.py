"""Checks that models' own rank files give the token ids of the programs that they were made for (`record_ranks`)."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies import ranks
from llamaclust.tools.convert.vocabularies.families import vocabulary_of
from llamaclust.tools.convert.vocabularies.probe import PROBE
from llamaclust.tools.convert.vocabularies.reading import read_words
from llamaclust.tools.convert.vocabularies.words import Words
from support.models.record_ranks import SPECIAL, tekken_json
from support.paths import DATA

RECORDED = json.loads((DATA / "tokenizers/ranks.json").read_text())
WORDS = [base64.b64decode(word) for word in RECORDED["words"]]


def read(place: Path, rows: int) -> Words:
    with SourceFiles() as files:
        return read_words(files, place, rows)


def write_ranks(path: Path) -> None:
    path.write_text("".join(f"{word} {rank}\n" for rank, word in enumerate(RECORDED["words"])))


def test_llama_3_s_own_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_LLAMA3_WORDS", len(WORDS))
    write_ranks(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(read(tmp_path / "tokenizer.model", len(WORDS) + 256).metadata())
    assert tokenizer.encode(PROBE) == [len(WORDS), *RECORDED["ids"]["llama3"]]
    assert tokenizer.decode(RECORDED["ids"]["llama3"]) == PROBE
    chat = "<|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
    ids = tokenizer.encode(chat, add_special=False, parse_special=True)
    assert [token_id - len(WORDS) for token_id in ids if token_id >= len(WORDS)] == [6, 7, 9]
    assert len(WORDS) + 9 in tokenizer.end_of_generation and tokenizer.eos_id == len(WORDS) + 1
    assert tokenizer.token_text(len(WORDS) + 255) == "<|reserved_special_token_246|>"


def test_glm_4_s_own_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks further words from tokenizer_config.json beside the file."""
    monkeypatch.setattr(ranks, "_GLM4_WORDS", len(WORDS))
    write_ranks(tmp_path / "tokenizer.model")
    special = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"]
    added = {str(len(WORDS) + at): {"content": text, "special": True} for at, text in enumerate(special)}
    said = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    words = read(tmp_path, len(WORDS) + len(special))
    assert words.pre == "chatglm-bpe" and words.ids["eos"] == len(WORDS)
    tokenizer = load_tokenizer(words.metadata())
    assert tokenizer.encode(PROBE) == RECORDED["ids"]["glm4"]
    ids = tokenizer.encode("[gMASK]<sop><|user|>", parse_special=True)
    assert [token_id - len(WORDS) for token_id in ids] == [2, 4, 7]


def test_qwen_s_own_form(tmp_path: Path) -> None:
    write_ranks(tmp_path / "qwen.tiktoken")
    tokenizer = load_tokenizer(read(tmp_path, len(WORDS) + 208).metadata())
    assert tokenizer.encode(PROBE) == RECORDED["ids"]["qwen"]


@pytest.mark.parametrize(("architecture", "bos"), [("hunyuan-moe", "<|bos|>"), ("hunyuan-dense", "<|startoftext|>")])
def test_hunyuan_s_own_form(architecture: str, bos: str, tmp_path: Path) -> None:
    """Checks that text is split as Qwen's, and that config.json's BOS id of another vocabulary is ignored."""
    write_ranks(tmp_path / "hy.tiktoken")
    end = len(WORDS) + 3
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": end, "eod_token_id": end + 2}))
    with SourceFiles() as files:
        words = vocabulary_of(architecture, files, tmp_path, len(WORDS) + 210)
    tokenizer = load_tokenizer(words.metadata())
    assert tokenizer.encode(PROBE) == RECORDED["ids"]["qwen"]
    assert tokenizer.token_text(tokenizer.bos_id or 0) == bos and tokenizer.eos_id == end
    assert {end, end + 2} <= {*tokenizer.end_of_generation}
    assert tokenizer.token_text(len(WORDS) + 209) == "<|extra_204|>"


def test_kimi_s_own_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks further words from tokenizer_config.json beside the file, which omits some."""
    monkeypatch.setattr(ranks, "_KIMI_WORDS", len(WORDS))
    write_ranks(tmp_path / "tiktoken.model")
    special = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 7: "<|im_user|>"}
    added = {str(len(WORDS) + at): {"content": text, "special": True} for at, text in special.items()}
    said = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    words = read(tmp_path, len(WORDS) + 256)
    assert words.pre == "kimi-k2" and words.ids["bos"] == len(WORDS) and words.ids["eos"] == len(WORDS) + 1
    tokenizer = load_tokenizer(words.metadata())
    assert tokenizer.decode(tokenizer.encode(PROBE, add_special=False)) == PROBE
    assert {len(WORDS) + 1, len(WORDS) + 2} <= {*tokenizer.end_of_generation}


def test_tekken(tmp_path: Path) -> None:
    """Checks that special tokens come first, and that words beyond the model's size are left out."""
    (tmp_path / "tekken.json").write_text(tekken_json(WORDS))
    size = len(WORDS) - 4 + SPECIAL
    words = read(tmp_path, size)
    assert words.pre == "tekken" and words.texts[:4] == ["<unk>", "<s>", "</s>", "<SPECIAL_3>"]
    tokenizer = load_tokenizer(words.metadata())
    assert tokenizer.encode(PROBE) == RECORDED["ids"]["tekken"] and RECORDED["ids"]["tekken"][0] == tokenizer.bos_id
    assert tokenizer.decode(RECORDED["ids"]["tekken"][1:]) == PROBE
    said = json.loads(tekken_json(WORDS))
    del said["special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(said))
    assert read(tmp_path, size).texts[3:5] == ["[INST]", "[/INST]"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"pattern": "x"}}, "'default_num_special_tokens': missing"),
        ({"vocab": []}, "expected 696 words, found 0"),
        ({"vocab": [{"rank": 0, "token_bytes": "!"}]}, "the word of rank 0 is not base64"),
        ({"vocab": [{"rank": 0}]}, "a word has no rank or no bytes"),
        ({"vocab": 7}, "vocab is not a list of objects"),
        ({"special_tokens": [{"rank": 99, "token_str": "<s>"}]}, "'<s>' has rank 99, expected a rank below 30"),
        ({"pattern": "\\w+"}, "splits text unlike any known pre-tokenizer"),
        ({"pattern": "(" * 9}, "invalid pattern"),
    ],
)
def test_damaged_tekken_files_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    said = json.loads(tekken_json(WORDS))
    if "pattern" in change:
        change = {"config": said["config"] | change}
    (tmp_path / "tekken.json").write_text(json.dumps(said | change))
    with pytest.raises(ModelFileError, match=message):
        read(tmp_path, 1000)


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path / "tokenizer.model")
    with pytest.raises(
        ModelFileError, match="700 ranks fit no known tokenizer; Llama 3 has 128000, GLM-4 151329, Kimi 163584"
    ):
        read(tmp_path / "tokenizer.model", 1000)
