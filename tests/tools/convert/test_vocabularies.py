"""Checks that checkpoints' tokenizers give the vocabularies and token ids of llama.cpp's GGUF files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.values import shown
from llamaclust.model.tokenizers.byte_pairs import splitter, stand_ins
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.pre_tokenizers import known_pre_tokenizers
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.probe import PROBE, cut, recognised
from llamaclust.tools.convert.vocabularies.reading import read_words
from llamaclust.tools.convert.vocabularies.words import Words
from support.models.tiny_tokenizers import byte_level, tokenizer_json
from support.paths import DATA

DATA_FOLDER = DATA / "tokenizers"
_CUT_ALIKE = {("llama-bpe", "dbrx"), ("qwen2", "bailingmoe"), ("qwen2", "minicpm5"), ("bailingmoe", "minicpm5")}
"""Pre-tokenizers that split alike and differ elsewhere, or only in the notation of the same expression."""


def read(place: Path, rows: int) -> Words:
    with SourceFiles() as files:
        return read_words(files, place, rows)


def test_the_probe_tells_all_known_pre_tokenizers_apart() -> None:
    pieces = {name: cut(splitter(kind)) for name, kind in known_pre_tokenizers().items()}
    names = list(pieces)
    alike = {(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if pieces[a] == pieces[b]}
    assert alike == _CUT_ALIKE
    assert len(set(PROBE)) > 200
    for name, kind in known_pre_tokenizers().items():
        found = recognised(splitter(kind), kind.ignore_merges, kind.add_bos)
        assert found == ("qwen2" if name == "bailingmoe" else name)


def as_tokenizer_json(vocabulary: str, folder: Path) -> dict[str, Any]:
    """Returns a tokenizer.json with its configuration that gives one of llama.cpp's vocabularies."""
    metadata = open_model(DATA_FOLDER / f"ggml-vocab-{vocabulary}.gguf").metadata
    texts, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"]  # type: ignore[arg-type]
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = [i for i, kind in enumerate(types) if kind != 1]  # type: ignore[arg-type]
    regex = "|".join(known_pre_tokenizers()[vocabulary].expressions)
    split = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    pre = pre_tokenizers.ByteLevel(False) if vocabulary == "gpt-2" else pre_tokenizers.Sequence(split)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre
    said = json.loads(library.to_str())
    said["added_tokens"] = [{"id": i, "content": texts[i], "special": True, **plain} for i in added]
    said["model"]["vocab"] = {text: i for i, text in enumerate(texts) if i not in added}
    said["model"]["merges"] = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]  # type: ignore[union-attr]
    said["model"]["ignore_merges"] = known_pre_tokenizers()[vocabulary].ignore_merges
    (folder / "tokenizer.json").write_text(json.dumps(said))
    ends = {f"{part}_token": texts[int(metadata[f"tokenizer.ggml.{part}_token_id"])] for part in ("bos", "eos")}  # type: ignore[arg-type]
    (folder / "tokenizer_config.json").write_text(json.dumps(ends))
    return dict(metadata)


@pytest.mark.parametrize("vocabulary", ["gpt-2", "llama-bpe"])
def test_byte_level_words_are_those_of_llama_cpp_s_file(vocabulary: str, tmp_path: Path) -> None:
    wanted = as_tokenizer_json(vocabulary, tmp_path)
    found = read(tmp_path, len(wanted["tokenizer.ggml.tokens"])).metadata()
    for key in ("tokens", "merges", "pre", "bos_token_id", "eos_token_id"):
        assert list_of(found[f"tokenizer.ggml.{key}"]) == list_of(wanted[f"tokenizer.ggml.{key}"]), key
    np.testing.assert_array_equal(found["tokenizer.ggml.token_type"], wanted["tokenizer.ggml.token_type"])


def list_of(value: Any) -> Any:
    return value if isinstance(value, str | int) else list(value)


def test_another_way_to_cut_text_is_refused(tmp_path: Path) -> None:
    said = json.loads(tokenizer_json())
    for cutter in ({"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(said | {"pre_tokenizer": cutter}))
        with pytest.raises(ModelFileError, match="splits text unlike any known pre-tokenizer"):
            read(tmp_path, 320)
    (tmp_path / "tokenizer.json").write_text(json.dumps(said | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(ModelFileError, match="'Lowercase' is not supported"):
        read(tmp_path, 320)


def test_sentence_piece_s_files_and_tokenizer_json_say_the_same(tmp_path: Path) -> None:
    """Checks that merges in the order of SentencePiece's scores give the same token ids."""
    wanted = open_model(DATA_FOLDER / "ggml-vocab-llama-spm.gguf").metadata
    texts = list(wanted["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    scores, types = wanted["tokenizer.ggml.scores"], wanted["tokenizer.ggml.token_type"]
    (tmp_path / "tokenizer.model").write_bytes(proto(texts, scores, types))
    found = read(tmp_path, len(texts)).metadata()
    assert found["tokenizer.ggml.tokens"] == texts
    np.testing.assert_array_equal(found["tokenizer.ggml.scores"], scores)
    np.testing.assert_array_equal(found["tokenizer.ggml.token_type"], types)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(library_form(texts, scores)))
    tokenizer, original = load_tokenizer(read(tmp_path, len(texts)).metadata()), load_tokenizer(wanted)
    for text in (DATA_FOLDER / "ggml-vocab-llama-spm.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")[:-1]:
        assert tokenizer.encode(text) == original.encode(text)


def proto(texts: list[str], scores: Any, types: Any) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    for text, score, kind in zip(texts, scores, types, strict=True):
        model.pieces.add(piece=text, score=float(score), type=int(kind))
    data: bytes = model.SerializeToString()
    return data


def library_form(texts: list[str], scores: Any) -> dict[str, Any]:
    """Returns tokenizer.json as Hugging Face's library converts it from a SentencePiece file."""
    ids = {text: i for i, text in enumerate(texts)}
    merges = [
        (scores[i], text[:at], text[at:])
        for text, i in ids.items()
        for at in range(1, len(text))
        if i > 258 and text[:at] in ids and text[at:] in ids
    ]
    merges.sort(key=lambda one: -one[0])
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": ids}
    prepend = {"type": "Prepend", "prepend": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    special = [{"id": i, "content": texts[i], "special": True} for i in range(3)]
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": {}},
        "model": model | {"merges": [f"{left} {right}" for _, left, right in merges]},
    }


def test_ranks_give_merges(tmp_path: Path) -> None:
    """Checks that Qwen's list of ranks gives the merges of its words."""
    said = byte_level(320)
    letters = stand_ins()
    words = list(said["tokenizer.ggml.tokens"])[:317]  # type: ignore[arg-type]
    spelled = [word for word in words if not word.startswith("[unused")]
    lines = [base64.b64encode(b"".join(letters[one] for one in word)) + b" %d" % i for i, word in enumerate(spelled)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    found = read(tmp_path, len(spelled) + 208)
    assert found.texts[: len(spelled)] == spelled and found.texts[len(spelled)] == "<|endoftext|>"
    assert found.pre == "qwen2" and found.ids["eos"] == len(spelled)
    tokenizer = load_tokenizer(found.metadata())
    wanted = load_tokenizer(said | {"tokenizer.ggml.pre": "qwen2"})
    for text in ("the people could see", "a number of words, in the end"):
        assert [tokenizer.token_text(i) for i in tokenizer.encode(text)] == [
            wanted.token_text(i) for i in wanted.encode(text)
        ]


def test_chatglm_s_program_adds_words_behind_its_file(tmp_path: Path) -> None:
    from llamaclust.tools.convert.conversion import convert
    from llamaclust.tools.convert.formats.opening import Hints
    from support.models.checkpoint_files import write_hugging_face
    from support.models.random_checkpoints import checkpoint

    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc"]
    types = [2, 3, 3, *[6] * 256, *[1] * 4]
    write_hugging_face(tmp_path, *checkpoint("ChatGLMModel"))
    (tmp_path / "tokenizer.model").write_bytes(proto(texts, [0.0] * len(texts), types))
    convert(tmp_path, tmp_path / "m.gguf", "f16", Hints(), lambda done, total: None, None)
    metadata = open_model(tmp_path / "m.gguf").metadata
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.encode("[gMASK]sop<|user|>", parse_special=True) == [264, 266, 269]
    assert 269 in tokenizer.end_of_generation and not tokenizer.add_bos


def test_added_words_ends_and_template_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|tool|>": 320, "<word>": 321}))
    said = {
        "eos_token": {"content": "<|im_end|>"},
        "bos_token": None,
        "add_bos_token": False,
        "chat_template": "{{ 1 }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    generation = {"eos_token_id": [319, 320], "bos_token_id": 317, "suppress_tokens": [318, 320, 330, None]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    words = read(tmp_path, 330)
    assert words.metadata()["tokenizer.ggml.suppress_tokens"].tolist() == [318, 320]  # type: ignore[union-attr]
    assert words.texts[320:323] == ["<|tool|>", "<word>", "[PAD322]"] and len(words.texts) == 330
    assert [int(kind) for kind in words.types[320:323]] == [3, 4, 5]
    assert (words.ids["eos"], words.ids["eot"], words.ids["bos"]) == (319, 320, 317)
    assert words.templates == {"default": "{{ 1 }}"}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, 321, 320]}))
    ids = read(tmp_path, 330).ids
    assert (ids["eos"], ids["eot"], ids["eom"]) == (319, 320, 321)
    assert not read(tmp_path, 330).notes
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert read(tmp_path, 330).templates == {"default": "{{ 2 }}"}


def test_named_templates_of_a_folder_are_written(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    stated = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}", "no name": "{{ 4 }}"}
    listed = [{"name": name, "template": text} for name, text in stated.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ 5 }}")
    found = {key: value for key, value in read(tmp_path, 330).metadata().items() if "chat_template" in key}
    assert found.pop("tokenizer.chat_templates") == ["tool_use", "rag"]
    assert found == {
        "tokenizer.chat_template": "{{ 1 }}",
        "tokenizer.chat_template.tool_use": "{{ 2 }}",
        "tokenizer.chat_template.rag": "{{ 5 }}",
    }


UNMARKED = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("processor", "stated", "has_bos"),
    [
        (None, True, True),
        (None, False, False),
        (None, None, False),
        (UNMARKED, True, False),
    ],
)
def test_a_stated_bos_is_used_unless_the_tokenizer_has_a_template(
    processor: Any, stated: bool | None, has_bos: bool, tmp_path: Path
) -> None:
    document = json.loads(tokenizer_json()) | {"post_processor": processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    said = {} if stated is None else {"add_bos_token": stated}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert read(tmp_path, 330).flags["add_bos_token"] == has_bos


def test_control_tokens_stay_such_if_they_are_also_added(tmp_path: Path) -> None:
    document = json.loads(tokenizer_json())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    mark = {"id": 320, "content": "[MARK]", "special": True, **flags}
    document["added_tokens"] = [*document.get("added_tokens", ()), mark]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[MARK]": 320, "<word>": 321}))
    assert [int(kind) for kind in read(tmp_path, 330).types[320:322]] == [3, 4]


@pytest.mark.parametrize(
    ("listed", "eod", "ends"),
    [
        ([319, 5], 5, (5, None)),
        ([319, 5, 5, 319], 6, (5, 6)),
        (319, 330, (None, None)),
        ([319, 6, 10**30, -1, 330, [5], "5", True], 7, (6, 7)),
        ([319, 5, 6, 7], 8, (7, 6)),
    ],
)
def test_each_end_is_written_once_and_is_a_word(
    listed: Any, eod: int, ends: tuple[int | None, ...], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": listed, "eod_token_id": eod}))
    words = read(tmp_path, 330)
    assert words.ids["eos"] == 319 and (words.ids.get("eot"), words.ids.get("eom")) == ends
    left = [5, 8] if ends == (7, 6) else []
    assert len(words.notes) == bool(left)
    assert all(shown(words.texts[end]) in words.notes[0] for end in left)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(300, "320 tokens, but the embedding has 300 rows"), (55296, "only 320 tokens, but the embedding has 55296 rows")],
)
def test_the_tokenizer_of_another_model(rows: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    with pytest.raises(ModelFileError, match=f"{message}: use the tokenizer that belongs to the model"):
        read(tmp_path, rows)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.model", b"\xff\xfe\x00garbage" * 9, "neither a SentencePiece model nor a tiktoken file"),
        ("tokenizer.model", b"", "has no pieces"),
        ("tokenizer.model", b"YQ== 0\n!!! 1\n", "line 2: expected a word in base64"),
        ("tokenizer.json", b"{", "the JSON cannot be read"),
        ("tokenizer.json", b"[1]", "expected a JSON object"),
        ("tokenizer.json", b"[" * 100000, "nested too deeply"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', "'WordPiece' is not supported; supported: BPE"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 5e3}}}', "not whole numbers"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}}}', "not whole numbers"),
        ("tokenizer.bin", b"\0\0\0\0\0\0\0\0\xff\xff\xff\xff", "ends in word 0: it was cut short"),
    ],
)
def test_damaged_tokenizers_are_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelFileError, match=message) as caught:
        read(tmp_path / name, 320)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
