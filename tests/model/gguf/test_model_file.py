"""Tests of the GGUF reader with valid files: golden models, split models, late strings, and tensors read from disk."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import LazyStrings
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.gguf_bytes import array, gguf, key, number, tensor, text
from support.models.tiny_model import build_tiny_model
from support.paths import DATA

GOLDEN = sorted([*DATA.glob("tiny/*.gguf"), *DATA.glob("quant/*.gguf")])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


WIDTHS = {"baichuan": (64, 128), "mixed": (256, 256), "mixed-experts": (256, 256)}
"""Hidden and feed-forward widths of models that differ from the others."""


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_models_are_read_whole(path: Path) -> None:
    model = open_model(path)
    assert model.metadata_int("general.quantization_version", 2) == 2
    width, ffn = WIDTHS.get(path.stem, (256, 512))
    assert model.tensor("token_embd.weight").shape == (320, width)
    assert model.tensor("blk.0.attn_k.weight").shape == (64, width)
    last = model.metadata_int("llama.block_count", 3) - 1
    if path.stem != "mixed-experts":
        assert model.tensor(f"blk.{last}.ffn_down.weight").shape == (width, ffn)
    assert model.parts == (path,) and model.size_bytes == path.stat().st_size
    for each in model.tensors.values():
        assert len(each.read()) == each.n_bytes == each.rows * each.row_bytes


def test_last_tensor_ends_where_the_file_does() -> None:
    model = open_model(DATA / "tiny/llama.gguf")
    last = max(model.tensors.values(), key=lambda tensor: tensor.offset)
    assert last.offset + last.n_bytes == model.size_bytes


def test_values_of_a_golden_model() -> None:
    model = open_model(DATA / "tiny/llama.gguf")
    assert model.metadata_str("general.name") == "tiny model"
    assert model.metadata_float("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    words = model.metadata_strings("tokenizer.ggml.tokens")
    assert (words[0], words[3], words[259], words[-1], len(words)) == ("<unk>", "<0x00>", "▁w0", "▁w60", 320)
    scores = model.metadata["tokenizer.ggml.scores"]
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32 and (len(scores), scores[319]) == (320, -60)
    kinds = model.metadata["tokenizer.ggml.token_type"]
    assert isinstance(kinds, np.ndarray) and (len(kinds), kinds[:4].tolist()) == (320, [2, 3, 3, 6])


def test_block_sizes_agree_with_the_sizes_that_ggml_wrote() -> None:
    for path in GOLDEN:
        ordered = sorted(open_model(path).tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            assert -(-before.n_bytes // 32) * 32 == after.offset - before.offset, before.name


def test_types_have_the_numbers_and_blocks_of_ggml() -> None:
    assert (QuantType.Q4_K, QuantType.BF16, QuantType.MXFP4) == (12, 30, 39)
    assert (QuantType.Q4_K.info.block_size, QuantType.Q4_K.info.block_bytes) == (256, 144)


def test_version_two_is_read(tmp_path: Path) -> None:
    model = open_model(write(tmp_path / "v2.gguf", gguf([number("a", 7)], version=2)))
    assert model.metadata_int("a") == 7


def test_vocabulary_only_file_may_end_before_the_data_section(tmp_path: Path) -> None:
    path = write(tmp_path / "vocabulary.gguf", gguf([number("a", 7)])[:41])
    assert not open_model(path).tensors


def test_alignment_of_the_file_is_obeyed(tmp_path: Path) -> None:
    for alignment in (1, 8, 4096):
        keys = [number("general.alignment", alignment)]
        content = gguf(keys, [tensor("x", [2])], b"12345678", alignment=alignment)
        assert open_model(write(tmp_path / "aligned.gguf", content)).tensor("x").read() == b"12345678"


def test_arrays_of_every_kind(tmp_path: Path) -> None:
    values: dict[str, WritableValue] = {
        "i8": np.array([-1, 2], np.int8),
        "u64": np.array([1 << 63], np.uint64),
        "f64": np.array([0.5]),
        "bool": np.array([True, False]),
        "none": np.array([], np.float32),
        "words": ["a", "", "ü▁"],
    }
    write_gguf(tmp_path / "arrays.gguf", values, [])
    model = open_model(tmp_path / "arrays.gguf")
    for name, value in values.items():
        read = model.metadata[name]
        if isinstance(value, np.ndarray):
            assert isinstance(read, np.ndarray) and read.dtype == value.dtype and (read == value).all()
        else:
            assert isinstance(read, LazyStrings) and list(read) == value and read[1:] == ["", "ü▁"]


def test_nested_arrays_are_read_and_written(tmp_path: Path) -> None:
    inner = b"\x08\0\0\0" + (2).to_bytes(8, "little") + text("a") + text("b")
    content = gguf([array("nested", 9, 2, inner + inner)])
    model = open_model(write(tmp_path / "nested.gguf", content))
    outer = model.metadata["nested"]
    assert isinstance(outer, tuple)
    assert [list(item) for item in outer if isinstance(item, LazyStrings)] == [["a", "b"], ["a", "b"]]
    write_gguf(tmp_path / "again.gguf", model.metadata, [])
    assert (tmp_path / "again.gguf").read_bytes() == content


def test_getters_refuse_missing_wrong_and_out_of_bounds_values(tmp_path: Path) -> None:
    values: dict[str, WritableValue] = {
        "n": 5,
        "f": float("nan"),
        "t": "x",
        "b": True,
        "a": np.array([np.inf], np.float32),
    }
    write_gguf(tmp_path / "m.gguf", values, [])
    model = open_model(tmp_path / "m.gguf")
    assert model.metadata_int("absent", 3) == 3 and model.metadata_str("absent", "x") == "x"
    for call, message in (
        (lambda: model.metadata_int("absent"), "missing"),
        (lambda: model.metadata_int("n", maximum=4), "expected 0 to 4, found 5"),
        (lambda: model.metadata_int("b"), "expected a whole number, found a Boolean"),
        (lambda: model.metadata_float("f"), "nan"),
        (lambda: model.metadata_float("n"), "expected a decimal number, found a whole number"),
        (lambda: model.metadata_str("n"), "expected text"),
        (lambda: model.metadata_strings("a"), "expected an array of text, found an array of float32"),
        (lambda: model.tensor("absent"), "missing"),
    ):
        with pytest.raises(ModelFileError, match=message):
            call()


def test_strings_that_are_not_utf8_are_named_on_first_use(tmp_path: Path) -> None:
    content = gguf([array("words", 8, 2, text("good") + text(b"\xff\xfe"))])
    words = open_model(write(tmp_path / "words.gguf", content)).metadata_strings("words")
    assert len(words) == 2
    with pytest.raises(ModelFileError, match=r"words\.gguf: 'words': string 1 is not UTF-8"):
        list(words)


@pytest.mark.parametrize(
    ("name", "data", "shown"),
    [
        ("general.author", "José".encode("latin-1"), "Jos\ufffd"),
        ("general.description", b"caf\xe9 \xff\xfe!", "caf\ufffd \ufffd\ufffd!"),
        ("general.license", "東".encode()[:2], "\ufffd"),
        ("general.url", b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        ("general.name", "東京".encode(), "東京"),
    ],
)
def test_texts_that_are_not_utf8_damage_no_file(tmp_path: Path, name: str, data: bytes, shown: str) -> None:
    content = gguf([key(name, 8, text(data)), number("n", 5)])
    model = open_model(write(tmp_path / "author.gguf", content))
    assert model.metadata_str(name) == shown and model.metadata_int("n") == 5


def test_identity_tells_models_apart_and_is_the_same_for_a_copy(tmp_path: Path) -> None:
    one = open_model(build_tiny_model(tmp_path / "one.gguf", layers=1))
    copy = open_model(write(tmp_path / "copy.gguf", one.path.read_bytes()))
    other = open_model(build_tiny_model(tmp_path / "other.gguf", layers=1, seed=2))
    assert one.identity == copy.identity != other.identity
    assert one.size_bytes == other.size_bytes, "same header and size, other weights"


def large_vocabulary(path: Path) -> ModelFile:
    words = [f"word{number}" for number in range(150_000)]
    vocabulary: dict[str, WritableValue] = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": np.zeros(150_000, np.float32),
        "tokenizer.ggml.token_type": np.ones(150_000, np.int32),
        "tokenizer.ggml.merges": [f"{word[:-1]} {word[-1]}" for word in words],
    }
    write_gguf(path, vocabulary, [])
    return open_model(path)


def test_a_large_vocabulary_takes_linear_time(tmp_path: Path) -> None:
    path = large_vocabulary(tmp_path / "large.gguf").path
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        model = open_model(path)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    assert model.metadata_strings("tokenizer.ggml.merges")[149_999] == "word14999 9"
    print(f"150,000 words read in {min(seconds) * 1e3:.0f} ms, merges decoded in {time.perf_counter() - started:.3f} s")
    assert min(seconds) < 20


@pytest.fixture
def matrix(tmp_path: Path) -> Tensor:
    values = np.arange(512, dtype=np.float32).reshape(2, 256)
    path = tmp_path / "matrix.gguf"
    write_gguf(path, {}, [TensorSource("x", QuantType.F32, (2, 256), values.tobytes)])
    return open_model(path).tensor("x")


def test_ranges_of_a_tensor(matrix: Tensor) -> None:
    whole = np.arange(512, dtype=np.float32).tobytes()
    assert matrix.read() == whole
    assert matrix.read_range(4, 12) == whole[4:12] and matrix.read_range(9, 9) == b""
    buffer = np.zeros(256, np.float32)
    matrix.read_into(buffer.data, matrix.row_bytes)
    assert buffer.tobytes() == whole[1024:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: os.truncate(path, 500), "shrank from .* to 500 bytes"),
        (lambda path: os.utime(path, ns=(1, 1)), "changed since it was opened"),
        (lambda path: write(path.with_suffix(".new"), path.read_bytes()).replace(path), "changed since it was opened"),
    ],
    ids=["gone", "shrunk", "touched", "replaced"],
)
def test_a_file_that_changes_is_refused_by_name(matrix: Tensor, change: object, message: str) -> None:
    assert callable(change)
    change(matrix.path)
    with pytest.raises(ModelFileError, match=message) as caught:
        matrix.read()
    assert str(matrix.path) in str(caught.value)
