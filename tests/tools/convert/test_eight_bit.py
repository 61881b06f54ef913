"""Tests of checkpoints with 8-bit weights: floats of safetensors with scales, integers of llama2.c."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.tools.convert.formats.hugging_face import read_folder
from llamaclust.tools.convert.formats.llama2c import read_llama2c
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.quantized import E4M3
from support.models.checkpoint_files import write_hugging_face

ROWS, COLUMNS = 40, 24
Arrays = dict[str, NDArray[Any]]


def test_what_each_byte_stands_for() -> None:
    """Checks bytes of one sign bit, four exponent bits and three fraction bits, as in OCP's 8-bit floats."""
    for byte in range(256):
        exponent, fraction = byte >> 3 & 15, byte & 7
        size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        wanted = np.nan if byte & 127 == 127 else -size if byte >> 7 else size
        np.testing.assert_equal(E4M3[byte], np.float32(wanted))
    assert E4M3[0x7E] == 448 and E4M3[1] == 2.0**-9


def read_all(folder: Path, said: Mapping[str, Any], tensors: Arrays) -> Arrays:
    """Writes and reads a checkpoint; each matrix is read in two parts."""
    write_hugging_face(folder, {"architectures": ["X"], "quantization_config": said}, tensors)
    with SourceFiles() as files:
        found = read_folder(files, folder).tensors
        return {name: np.concatenate([one.read(0, 7), one.read(7, one.shape[0])]) for name, one in found.items()}


def matrix(generator: np.random.Generator) -> NDArray[np.uint8]:
    bytes_ = generator.integers(0, 256, (ROWS, COLUMNS), np.uint8)
    return np.where(bytes_ & 127 == 127, 0, bytes_).astype(np.uint8)


@pytest.mark.parametrize(
    ("said", "name", "shape", "spread"),
    [
        ({"quant_method": "fp8", "weight_block_size": [16, 10]}, "weight_scale_inv", (3, 3), (16, 10)),
        ({"quant_method": "fp8"}, "weight_scale", (), (ROWS, COLUMNS)),
        ({"quant_method": "compressed-tensors"}, "weight_scale", (ROWS, 1), (1, COLUMNS)),
        ({"quant_method": "compressed-tensors"}, "weight_scale", (1,), (ROWS, COLUMNS)),
    ],
    ids=["blocks", "whole", "rows", "one"],
)
def test_floats_are_multiplied_with_their_scales(
    said: dict[str, Any], name: str, shape: tuple[int, ...], spread: tuple[int, int], tmp_path: Path
) -> None:
    generator = np.random.default_rng(4)
    weights, scales = matrix(generator), generator.random(shape, np.float32).reshape(shape)
    plain = generator.standard_normal((ROWS, 3), np.float32)
    tensors: Arrays = {"m.weight": weights, f"m.{name}": scales, "m.input_scale": scales, "n.weight": plain}
    found = read_all(tmp_path, said, tensors)
    each = np.kron(scales.reshape((*shape, 1, 1)[:2]), np.ones(spread, np.float32))[:ROWS, :COLUMNS]
    assert found.keys() == {"m.weight", "n.weight"}
    np.testing.assert_array_equal(found["m.weight"], E4M3[weights] * each)
    np.testing.assert_array_equal(found["n.weight"], plain)


@pytest.mark.parametrize(
    ("said", "change", "message"),
    [
        ({"weight_block_size": [16, 16]}, {}, r"scales of shape \[3, 3\] do not fit 40 rows of 24"),
        ({"weight_block_size": 16}, {}, "'weight_block_size': expected two whole numbers"),
        ({"weight_block_size": [0, 16]}, {}, "'rows': expected a whole number of 1 to .*, found 0"),
        ({}, {}, r"scales of shape \[3, 3\] do not fit 40 rows of 24"),
        ({}, {"m.weight_scale_inv": np.ones((ROWS, 1, 2), np.float32)}, r"scales of shape \[40, 1, 2\]"),
        ({}, {"m.weight": np.zeros((ROWS, COLUMNS), np.float32)}, "expected an eight-bit float matrix"),
        (
            {},
            {"m.weight_scale_inv": np.zeros((3, 3), np.int32)},
            "eight-bit float matrix and its scales, found .* scales I32",
        ),
    ],
)
def test_scales_that_do_not_fit(said: dict[str, Any], change: Arrays, message: str, tmp_path: Path) -> None:
    weights = matrix(np.random.default_rng(5))
    tensors: Arrays = {"m.weight": weights, "m.weight_scale_inv": np.ones((3, 3), np.float32)}
    with pytest.raises(ModelFileError, match=message):
        read_all(tmp_path, {"quant_method": "fp8", **said}, tensors | change)


@pytest.mark.parametrize(
    ("shape", "block"), [((), None), ((3,), None), ((3, 1, 1), None), ((3, 2, 2), [8, 5]), ((3, 1, 1), [8, 5])]
)
def test_experts_in_one_tensor_have_scales_too(shape: tuple[int, ...], block: list[int] | None, tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    weights, scales = matrix(generator)[:30, :8].reshape(3, 10, 8), generator.random(shape, np.float32).reshape(shape)
    name = "mlp.experts.gate_up_proj"
    tensors: Arrays = {name: weights, f"{name}_scale_inv": scales, f"{name}_activation_scale": np.ones(1, np.float32)}
    write_hugging_face(
        tmp_path,
        {"architectures": ["X"], "quantization_config": {"quant_method": "fp8", "weight_block_size": block}},
        tensors,
    )
    with SourceFiles() as files:
        found = read_folder(files, tmp_path).tensors
        assert found.keys() == {name}
        values = np.concatenate([found[name].read(0, 2), found[name].read(2, 3)])
    wide = shape[1:] == (2, 2)
    each = np.broadcast_to(scales.reshape((*shape, 1, 1, 1)[:3]), (3, *(shape[1:] if wide else (1, 1))))
    spread = each.repeat(8 if wide else 10, axis=1)[:, :10].repeat(5 if wide else 8, axis=2)[:, :, :8]
    np.testing.assert_array_equal(values, E4M3[weights] * spread)


def test_scales_of_experts_that_do_not_fit(tmp_path: Path) -> None:
    tensors: Arrays = {"x.down_proj": np.zeros((3, 10, 8), np.uint8), "x.down_proj_scale_inv": np.ones(2, np.float32)}
    with pytest.raises(ModelFileError, match=r"scales of shape \[2\] do not fit \[3, 10, 8\]"):
        read_all(tmp_path, {"quant_method": "fp8"}, tensors)


SHAPE = {"dim": 16, "hidden": 20, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 12, "context": 8}
GROUP = 8  # does not divide a row of the 20-column matrix


def version_two(group: int = GROUP) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    """Returns a file as llama2.c's export.py writes it, and the weights that runq.c computes with."""
    generator = np.random.default_rng(6)
    layers, width, hidden, key = SHAPE["layers"], SHAPE["dim"], SHAPE["hidden"], 8
    wanted: dict[str, NDArray[np.float32]] = {}
    data = pack("<2I7iBi", 0x616B3432, 2, *SHAPE.values(), 0, group).ljust(256, b"\0")
    for name in (*(f"layers.{n}.{part}_norm" for part in ("attention", "ffn") for n in range(layers)), "norm"):
        wanted[name] = generator.standard_normal(width, np.float32)
        data += wanted[name].tobytes()
    shapes = {
        "attention.wq": (width, width),
        "attention.wk": (key, width),
        "attention.wv": (key, width),
        "attention.wo": (width, width),
        "feed_forward.w1": (hidden, width),
        "feed_forward.w2": (width, hidden),
        "feed_forward.w3": (hidden, width),
    }
    every = {f"layers.{n}.{part}": shape for part, shape in shapes.items() for n in range(layers)}
    ends = (SHAPE["vocabulary"], width)
    for name, shape in ({"tok_embeddings": ends} | every | {"output": ends}).items():
        numbers = generator.integers(-127, 128, shape, np.int8)
        scales = generator.random(numbers.size // GROUP, np.float32)
        wanted[name] = (numbers.reshape(-1, GROUP) * scales[:, None]).reshape(shape).astype(np.float32)
        data += numbers.tobytes() + scales.tobytes()
    return data, wanted


def test_version_two_of_llama2c(tmp_path: Path) -> None:
    data, wanted = version_two()
    (tmp_path / "model.bin").write_bytes(data)
    with SourceFiles() as files:
        checkpoint = read_llama2c(files, tmp_path / "model.bin")
        assert checkpoint.tensors.keys() == {f"{name}.weight" for name in wanted}
        for name, weights in wanted.items():
            tensor = checkpoint.tensors[f"{name}.weight"]
            assert tensor.shape == weights.shape
            found = np.concatenate([tensor.read(0, 3), tensor.read(3, tensor.shape[0])])
            np.testing.assert_array_equal(found, weights, name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (version_two()[0][:-4], "was cut short"),
        (version_two()[0] + b"x", "bytes, but the file has"),
        (version_two(0)[0], "expected groups of 1 to 16 weights, found 0"),
        (version_two(7)[0], "expected a multiple of 7 weights, found 192"),
    ],
    ids=["short", "long", "none", "seven"],
)
def test_files_of_llama2c_that_do_not_fit(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    with SourceFiles() as files, pytest.raises(ModelFileError, match=message):
        read_llama2c(files, tmp_path / "model.bin")
