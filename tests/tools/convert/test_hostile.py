"""Checks that damaged or hostile checkpoints are refused with one clear error, and that none of their code runs."""

from __future__ import annotations

import base64
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import LlamaclustError, ModelFileError, UsageError
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.formats.hugging_face import read_weights
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.formats.safe_pickle import read_pickle
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.vocabularies.ranks import read_ranks
from llamaclust.tools.convert.vocabularies.tokenizer_json import _template_ends
from support.models.checkpoint_files import write_archive, write_hugging_face, write_torch
from support.models.random_checkpoints import checkpoint
from support.models.tiny_tokenizers import tokenizer_json


def refused(source: Path, message: str, type_name: str = "f32") -> None:
    """Asserts that a conversion fails with one line and leaves no file."""
    out = source.parent / "refused.gguf"
    with pytest.raises(LlamaclustError, match=message) as caught:
        convert(source, out, type_name, Hints(), lambda done, total: None, None)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not out.exists() and not list(source.parent.glob(".*"))


def folder(path: Path, **how: Any) -> Path:
    config, tensors = checkpoint("LlamaForCausalLM")
    write_hugging_face(path / "model", config, tensors, **how)
    (path / "model/tokenizer.json").write_text(tokenizer_json())
    return path / "model"


class Runs:
    """An object whose pickle calls a function when Python's own reader loads it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._what = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._what


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_by_name(protocol: int, tmp_path: Path) -> None:
    import os

    place = tmp_path / "touched"
    data = pickle.dumps({"a": Runs(os.system, f"touch {place}")}, protocol)
    with pytest.raises(ModelFileError, match=r"'(posix|os)\.system', which no state dict needs; no code was run"):
        read_pickle(data, "x.bin")
    (tmp_path / "m").mkdir()
    write_archive(tmp_path / "m/pytorch_model.bin", {"archive/data.pkl": data})
    (tmp_path / "m/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    refused(tmp_path / "m", "which no state dict needs")
    assert not place.exists()


@pytest.mark.parametrize(
    "value",
    [
        Runs(eval, "1"),
        Runs(getattr, "a", "b"),
        Path("x"),
        {1.5: 2},
        {"a": {3}},
        bytearray(b"x"),
        complex(1, 2),
        print,
        Runs(pickle.loads, b""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_else_a_pickle_names_is_refused(value: Any) -> None:
    for protocol in (2, 4):
        with pytest.raises(ModelFileError, match="no code was run"):
            read_pickle(pickle.dumps(value, protocol), "x.bin")


def test_damaged_pickles_end_in_an_error() -> None:
    data = pickle.dumps({f"key{i}": (i, "x", None, True, [1, 2]) for i in range(20)}, 2)
    assert read_pickle(data, "x")["key3"] == (3, "x", None, True, [1, 2])
    generator = np.random.default_rng(4)
    for end in range(0, len(data), 7):
        with pytest.raises(ModelFileError):
            read_pickle(data[:end], "x")
    for _ in range(400):
        changed = bytearray(data)
        for at in generator.integers(0, len(data), 3):
            changed[at] = generator.integers(0, 256)
        try:
            read_pickle(bytes(changed), "x")
        except ModelFileError as error:
            assert "\n" not in str(error)
    huge_memo = b"\x80\x02}r\xff\xff\xff\x7f."  # a memo index far beyond the file's size
    assert read_pickle(huge_memo, "x") == {}


def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    model = folder(tmp_path, torch=True)
    write_torch(model / "pytorch_model.bin", {"a": np.zeros(1 << 20, np.float32)}, compression=zipfile.ZIP_DEFLATED)
    refused(model, "is compressed or encrypted, which is not supported: torch.save did not write it")
    write_torch(model / "pytorch_model.bin", {"a": np.zeros(64, np.float32)})
    data = bytearray((model / "pytorch_model.bin").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 28] = (1 << 30).to_bytes(4, "little") * 2
    (model / "pytorch_model.bin").write_bytes(data)
    refused(model, "claims 1073741824 bytes, but the file has")


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    model = folder(tmp_path, torch=True)
    write_archive(
        model / "pytorch_model.bin", {f"archive/data/{i}": b"x" * 64 for i in range(3)} | {"archive/data.pkl": b"."}
    )
    data = bytearray((model / "pytorch_model.bin").read_bytes())
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    (model / "pytorch_model.bin").write_bytes(data)
    refused(model, "begins inside another")


def test_pytorch_files_with_numbers_that_do_not_fit(tmp_path: Path) -> None:
    model = folder(tmp_path, torch=True)
    path = model / "pytorch_model.bin"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    write_archive(path, members | {"archive/data/0": members["archive/data/0"][:-4]})
    refused(model, r"bytes in the archive member, found \d+")
    write_archive(path, {name: data for name, data in members.items() if name != "archive/data/3"})
    refused(model, "data/3 are missing")
    write_archive(path, members | {"archive/byteorder": b"big"})
    refused(model, "not little-endian")
    for end in (10, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:end])
        refused(model, "cut short|damaged|not a zip file")


def test_columns_first_are_read_like_rows_first(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_torch(tmp_path / "pytorch_model.bin", {"a": np.asfortranarray(values), "b": values})
    with SourceFiles() as files:
        tensors = read_weights(files, tmp_path)
        np.testing.assert_array_equal(tensors["a"].read(1, 3), values[1:3])
        np.testing.assert_array_equal(tensors["b"].all(), values)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F8_E5M2"}, "type 'F8_E5M2' is not supported; supported are F64, F32"),
        ({"shape": [320, 63]}, r"bytes for shape \[320, 63\] of F32, found"),
        ({"shape": [-320, -64]}, "must be whole numbers"),
        ({"shape": [1 << 47, 1 << 47]}, "bytes for shape"),
        ({"shape": [1 << 47] * 100_000}, "100000 dimensions; the limit is 5"),
        ({"data_offsets": [4, 81924]}, "expected at byte 0 of the data, found at 4"),
        ({"data_offsets": [0, 1 << 50]}, "must be whole numbers"),
        ({"data_offsets": None}, "not complete"),
    ],
)
def test_safetensors_with_headers_that_make_no_sense(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = folder(tmp_path)
    header, data = header_of(model / "model.safetensors")
    header["model.embed_tokens.weight"] |= change
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(model, message)


def test_files_and_shards_that_are_cut_short_or_missing(tmp_path: Path) -> None:
    model = folder(tmp_path, shards=3)
    second = model / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    for end in (0, 7, 8, 500, len(whole) - 1):
        second.write_bytes(whole[:end])
        refused(model, "cut short|damaged|not a safetensors")
    second.unlink()
    refused(model, "missing, but model.safetensors.index.json lists it; get all shards")
    (model / "model.safetensors.index.json").unlink()
    refused(model, "expected 3 shards, found 2")
    second.write_bytes((model / "model-00001-of-00003.safetensors").read_bytes())
    refused(model, "is in another shard too")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(model, "which is not a file name")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": second.name}}))
    refused(model, "tensor 'a' is missing, but model.safetensors.index.json lists it")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": 10**12}, "expected a whole number of 1 to 1048576, found 1000000000000"),
        ({"n_heads": 0}, "expected a whole number of .*, found 0"),
        ({"n_layers": "many"}, "expected a whole number of .*, found 'many'"),
        ({"norm_eps": 1e300}, "'norm_eps': expected 1e-12 to 0.1, found 1e.300"),
        ({"n_heads": 3}, "3 does not divide a width of 64"),
        ({"dim": 32}, "expected"),
    ],
)
def test_absurd_params(params: dict[str, Any], message: str, tmp_path: Path) -> None:
    said = {"dim": 64, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5, **params}
    (tmp_path / "m").mkdir()
    (tmp_path / "m/params.json").write_text(json.dumps(said))
    shapes = {"tok_embeddings.weight": (320, 64), "norm.weight": (64,), "layers.0.feed_forward.w1.weight": (96, 64)}
    write_torch(
        tmp_path / "m/consolidated.00.pth", {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    )
    refused(tmp_path / "m", message)


def test_meta_s_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4}))
    refused(tmp_path / "m", "expected consolidated.00.pth, consolidated.01.pth and so on, found none")
    one = {"norm.weight": np.ones(64, np.float32), "layers.0.attention.wq.weight": np.ones((32, 64), np.float32)}
    write_torch(tmp_path / "m/consolidated.00.pth", one)
    write_torch(tmp_path / "m/consolidated.02.pth", one)
    refused(tmp_path / "m", "found consolidated.00.pth, consolidated.02.pth")
    (tmp_path / "m/consolidated.02.pth").unlink()
    write_torch(tmp_path / "m/consolidated.01.pth", {"norm.weight": one["norm.weight"]})
    refused(tmp_path / "m", "is not in every .pth file")
    write_torch(
        tmp_path / "m/consolidated.01.pth", one | {"layers.0.attention.wq.weight": np.ones((32, 32), np.float32)}
    )
    refused(tmp_path / "m", r"expected shape \[32, 64\] as in the first file, found \[32, 32\]")


@pytest.mark.parametrize("data", [b"", b"GGUF" + bytes(99), bytes(300), b"\x10\0\0\0" * 80, np.arange(9999).tobytes()])
def test_other_files_are_no_checkpoints(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    refused(tmp_path / "x.bin", "not a checkpoint of a known kind|already a GGUF file|cut short")


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither config.json .* nor params.json")
    model = folder(tmp_path)
    refused(model, "--type q4_0: give one of f32, f16, bf16, q8_0", "q4_0")
    (model / "tokenizer.json").unlink()
    refused(model, "no tokenizer .*; name a tokenizer with --tokenizer")
    refused(model / "model.safetensors", "weights without their folder")


def test_hints_that_a_checkpoint_has_no_use_for_are_refused(tmp_path: Path) -> None:
    model = folder(tmp_path)
    for hints, message in (
        (Hints(config=tmp_path / "x.json"), "--config .*x.json is only for TencentPretrain's files"),
        (Hints(context_length=99), "--context-length 99 is not for a folder in Hugging Face's format"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(model, tmp_path / "out.gguf", "f32", hints, lambda done, total: None, None)


def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    """Checks GPTQ, which packs inputs and stores zero points less one, and AWQ, which reorders packed outputs."""
    generator = np.random.default_rng(7)
    inputs, outputs, group = 64, 32, 16
    steps = generator.integers(0, 16, (inputs, outputs)).astype(np.uint32)
    zeros = generator.integers(1, 16, (inputs // group, outputs)).astype(np.uint32)
    scales = generator.random((inputs // group, outputs)).astype(np.float16)
    groups = generator.permutation(np.arange(inputs) // group).astype(np.int32)
    places = 4 * np.arange(8, dtype=np.uint32)

    def packed(values: Any) -> Any:
        return np.bitwise_or.reduce(values.reshape(*values.shape[:-1], -1, 8) << places, axis=-1).view(np.int32)

    gptq = {"m.qweight": np.ascontiguousarray(packed(steps.T).T), "m.qzeros": packed(zeros - 1), "m.scales": scales}
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = [values.reshape(len(values), -1, 8)[..., order].reshape(values.shape) for values in (steps, zeros)]
    awq = {"m.qweight": packed(mixed[0]), "m.qzeros": packed(mixed[1]), "m.scales": scales}
    for method, tensors, of in (("gptq", gptq | {"m.g_idx": groups}, groups), ("awq", awq, np.arange(inputs) // group)):
        config = {"architectures": ["X"], "quantization_config": {"quant_method": method, "bits": 4}}
        place = write_hugging_face(tmp_path / method, config, tensors)
        with SourceFiles() as files:
            from llamaclust.tools.convert.formats.hugging_face import read_folder

            found = read_folder(files, place).tensors
            wanted = (steps.astype(np.float32) - zeros[of]) * scales.astype(np.float32)[of]
            assert found.keys() == {"m.weight"} and found["m.weight"].shape == (outputs, inputs)
            np.testing.assert_allclose(found["m.weight"].read(3, 21), wanted.T[3:21], rtol=1e-6)
    write_hugging_face(tmp_path / "bad", {"architectures": ["X"], "quantization_config": {"quant_method": "hqq"}}, awq)
    refused(tmp_path / "bad", "'hqq' is not supported; supported: gptq, awq, fp8, compressed-tensors, mxfp4")
    for method in ("gptq", "awq"):
        config = {"architectures": ["X"], "quantization_config": {"quant_method": method}}
        write_hugging_face(tmp_path / f"flat-{method}", config, {"m.qweight": np.zeros(8, np.int32)})
        refused(tmp_path / f"flat-{method}", r"expected a matrix, found shape \[8\]")


def doubled(levels: int) -> bytes:
    """Returns a pickle whose top of stack is a tuple of two equal tuples, nested `levels` deep."""
    return b"\x80\x04)q\x00" + b"h\x00h\x00\x86q\x00" * levels


@pytest.mark.parametrize("top", [doubled(60), b"\x80\x04)" + b"\x85" * 100_000], ids=["doubled", "deep"])
def test_pickles_that_are_small_and_print_large_are_refused_at_once(top: bytes) -> None:
    for rest in (b"X\x01\0\0\0a\x93.", b"K\x01\x86q\x01ccollections\nOrderedDict\n](h\x01e\x85R."):
        with pytest.raises(ModelFileError, match="no code was run"):
            read_pickle(top + rest, "x.bin")


def test_shapes_of_very_many_dimensions_are_refused_at_once(tmp_path: Path) -> None:
    model = folder(tmp_path)
    entry = {"dtype": "F32", "shape": [(1 << 47) - 1] * 200_000, "data_offsets": [0, 4]}
    text = json.dumps({"a": entry}).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    refused(model, "200000 dimensions; the limit is 5")
    (model / "model.safetensors").unlink()
    one = b"\x8a\x06" + ((1 << 47) - 1).to_bytes(6, "little")
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
    shape = b"(" + one * 200_000 + b"t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + shape + b"\x89)tR"
    data = b"\x80\x04}(X\x01\0\0\0a" + tensor + b"u."
    write_archive(model / "pytorch_model.bin", {"archive/data.pkl": data, "archive/data/0": bytes(4)})
    refused(model, "200000 dimensions; the limit is 5")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"rope_theta": 10**400}, "'rope_theta': .*found 1000"),
        ("config.json", {"rope_theta": float("1e300")}, r"'rope_theta': .*found 1e\+300"),
        ("config.json", {"rope_theta": float("nan")}, r"'rope_theta': expected 1 to 1e\+12, found nan"),
        ("config.json", {"rms_norm_eps": float("-inf")}, "'rms_norm_eps': expected 1e-12 to 0.1, found -inf"),
        ("config.json", {"num_key_value_heads": float("inf")}, "'num_key_value_heads': .*found inf"),
        ("tokenizer_config.json", {"chat_template": "\ud800"}, "half of a UTF-16 surrogate pair"),
        ("tokenizer.json", {"added_tokens": 5}, "not a list|a sequence"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": 5}}, "not a list|a sequence|a tokenizer"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x\n.bin"}}, "which is not a file name"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x\0.bin"}}, "which is not a file name"),
    ],
)
def test_values_that_no_program_writes(file: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = folder(tmp_path) / file
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | change))
    refused(path.parent, message)


def test_constants_of_settings_that_are_not_read_are_no_error(tmp_path: Path) -> None:
    path = folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"router_jitter": float("nan")}))
    convert(path.parent, tmp_path / "out.gguf", "f32", Hints(), lambda done, total: None, None)


def test_numbers_of_thousands_of_digits(tmp_path: Path) -> None:
    path = folder(tmp_path) / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + f', "seed": {"9" * 5000}}}')
    refused(path.parent, "the JSON cannot be read: a number has 5000 digits; the limit is 4000")


def test_what_is_of_another_kind_than_it_should_be_is_taken_for_missing(tmp_path: Path) -> None:
    model = folder(tmp_path)
    said = json.loads((model / "tokenizer.json").read_text())
    entries: tuple[Any, ...] = (1, {"SpecialToken": 5}, {"SpecialToken": {"id": []}})
    for entry in entries:
        odd = {"post_processor": {"type": "TemplateProcessing", "single": [entry, entry]}}
        assert _template_ends(said | odd) == (None, None)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": {}}], "added_tokens_decoder": {"9" * 5000: {"content": "x"}}})
    )
    convert(model, tmp_path / "out.gguf", "f32", Hints(), lambda done, total: None, None)


def test_a_type_that_is_no_text(tmp_path: Path) -> None:
    model = folder(tmp_path)
    header, data = header_of(model / "model.safetensors")
    header["model.embed_tokens.weight"]["dtype"] = []
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(model, "type '\\[\\]' is not supported")


def test_words_that_would_take_for_ever_to_merge() -> None:
    words = [bytes([byte]) for byte in range(256)] + [b"a" * (2 << power) for power in range(16)]
    lines = [base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)]
    with pytest.raises(ModelFileError, match="a word has 65536 bytes; the limit is 1024"):
        read_ranks(Path("x.tiktoken"), b"".join(lines))
