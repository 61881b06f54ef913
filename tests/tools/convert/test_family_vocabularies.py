"""Tests of tokenizers of families since SmolLM 3: pre-tokenizers, token roles, and Gemma 4's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.families import vocabulary_of
from llamaclust.tools.convert.vocabularies.words import Words
from support.models.tiny_tokenizers import spaced_byte_pairs, tokenizer_json
from support.seed import SEED

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_O200K = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_TEKKEN = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)


def vocabulary(folder: Path, said: Mapping[str, Any], architecture: str, rows: int = 320) -> Words:
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with SourceFiles() as files:
        return vocabulary_of(architecture, files, folder, rows)


def byte_level(pattern: str, *, ignore_merges: bool, removed: bool = False) -> dict[str, Any]:
    """Returns tokenizer.json with a split by an expression, then byte letters, as in these families."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed" if removed else "Isolated"}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    said: dict[str, Any] = json.loads(tokenizer_json())
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{**split, "invert": removed}, letters]}
    said["model"]["ignore_merges"] = ignore_merges
    return said


@pytest.mark.parametrize(
    ("architecture", "pattern", "ignore_merges", "removed", "name"),
    [
        ("smollm3", _CL100K, True, False, "llama-bpe"),
        ("olmo2", _CL100K, False, True, "dbrx"),
        ("glm4moe", _CL100K, False, False, "dbrx"),
        ("mistral3", _TEKKEN, True, False, "tekken"),
        ("gpt-oss", _O200K, False, True, "gpt-4o"),
        ("qwen35", _QWEN35, False, False, "qwen35"),
    ],
)
def test_pre_tokenizers_are_recognised(
    architecture: str, pattern: str, ignore_merges: bool, removed: bool, name: str, tmp_path: Path
) -> None:
    said = byte_level(pattern, ignore_merges=ignore_merges, removed=removed)
    assert vocabulary(tmp_path, said, architecture).pre == name


def test_words_that_are_not_merged_are_no_matter_where_merges_lead_to_all_of_them(tmp_path: Path) -> None:
    said = byte_level(_O200K, ignore_merges=True)
    reached = {text: token for text, token in said["model"]["vocab"].items() if not text.startswith("[unused")}
    said["model"]["vocab"] = reached
    assert vocabulary(tmp_path, said, "gpt-oss").pre == "gpt-4o"
    said["model"]["vocab"] = reached | {"zq": max(reached.values()) + 1}
    with pytest.raises(ModelFileError, match="splits text unlike any known pre-tokenizer"):
        vocabulary(tmp_path, said, "gpt-oss")


def test_roles_of_tokens_of_glm_4_5(tmp_path: Path) -> None:
    texts = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|observation|>"]
    said = byte_level(_CL100K, ignore_merges=False)
    said["added_tokens"] += [{**said["added_tokens"][0], "id": 320 + i, "content": t} for i, t in enumerate(texts[1:])]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": texts[0], "chat_template": "[gMASK]<sop>"})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [317, 322, 323]}))
    words = vocabulary(tmp_path, said, "glm4moe", 324)
    found = {part: words.texts[token] for part, token in words.ids.items()}
    assert found == {
        **{"eos": texts[0], "unknown": texts[0], "bos": texts[1]},
        **{"eot": texts[3], "eom": texts[4]},
    }
    tokenizer = load_tokenizer(words.metadata())
    assert {317, 322, 323} <= tokenizer.end_of_generation and not tokenizer.add_bos
    assert words.templates == {"default": "[gMASK]<sop>"}


def gemma4(rows: int = 600) -> tuple[dict[str, Any], list[str]]:
    """Returns a tokenizer.json like Gemma 4's, and the words."""
    said = spaced_byte_pairs(rows)
    texts, kinds = list(said["tokenizer.ggml.tokens"]), said["tokenizer.ggml.token_type"]  # type: ignore[arg-type]
    merges = [str(merge).split(" ") for merge in said["tokenizer.ggml.merges"] if "[" not in str(merge)]  # type: ignore[union-attr]
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    special = [i for i, kind in enumerate(np.asarray(kinds).tolist()) if kind in (2, 3)]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {str(text): i for i, text in enumerate(texts)},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": texts[i], "special": True, **plain} for i in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": model,
    }, [str(text) for text in texts]


def test_gemma_4_keeps_its_merges_and_gives_the_ids_of_the_library(tmp_path: Path) -> None:
    said, texts = gemma4()
    words = vocabulary(tmp_path, said, "gemma4", len(texts))
    metadata = words.metadata()
    assert metadata["tokenizer.ggml.model"] == "gemma4" and words.flags["add_space_prefix"] is False
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in said["model"]["merges"]]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    own = load_tokenizer(metadata)
    generator = np.random.default_rng(SEED)
    letters = ["the ", "people ", "a", "of ", "\n", "\n\n", "  ", "word", "é", "猫", ". ", "which "]
    for _ in range(50):
        text = "".join(generator.choice(letters, 12))
        assert own.encode(text, add_special=False) == library.encode(text, add_special_tokens=False).ids, repr(text)


def test_gemma_4_s_marks_stay_visible_and_its_ends_are_known(tmp_path: Path) -> None:
    said, texts = gemma4()
    marks = ["<|channel>", "<channel|>", '<|"|>', "<|tool_response>"]
    entry = said["added_tokens"][0]
    said["added_tokens"] += [{**entry, "id": len(texts) + i, "content": mark} for i, mark in enumerate(marks)]
    said_ends = {"bos_token_id": texts.index("<bos>"), "eos_token_id": [1, texts.index("<turn|>"), len(texts) + 3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(said_ends))
    words = vocabulary(tmp_path, said, "gemma4", len(texts) + len(marks))
    assert [int(words.types[len(texts) + i]) for i in range(3)] == [4, 4, 4]
    tokenizer = load_tokenizer(words.metadata())
    assert {1, texts.index("<turn|>"), len(texts) + 3} <= tokenizer.end_of_generation
    assert tokenizer.encode("a")[0] == texts.index("<bos>")


def test_gemma_4_without_merges_or_with_a_space_in_front_is_refused(tmp_path: Path) -> None:
    said, texts = gemma4()
    with pytest.raises(ModelFileError, match=r"has no merges; gemma4 needs the merges of tokenizer\.json"):
        vocabulary(tmp_path, said | {"model": said["model"] | {"merges": []}}, "gemma4", len(texts))
    steps = [{"type": "Prepend", "prepend": "▁"}, said["normalizer"]]
    with pytest.raises(ModelFileError, match="the vocabulary puts a space before a text"):
        vocabulary(tmp_path, said | {"normalizer": {"type": "Sequence", "normalizers": steps}}, "gemma4", len(texts))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with SourceFiles() as files, pytest.raises(ModelFileError, match=r"no tokenizer \(tokenizer\.json\)"):
        vocabulary_of("gemma4", files, tmp_path, len(texts))
