"""Checks that the GGUF writer's files are read back, and that a file appears complete or not at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import build_tiny_model
from support.models.tiny_quantizers import QUANTIZERS, quantize
from support.paths import DATA


def test_values_are_read_back_with_their_types(tmp_path: Path) -> None:
    values: dict[str, WritableValue] = {
        "small": 7,
        "negative": -7,
        "large": 1 << 40,
        "very negative": -(1 << 40),
        "true": True,
        "real": 0.1,
        "double": np.float64(0.1),
        "byte": np.uint8(200),
        "text": "ü▁\n",
    }
    write_gguf(tmp_path / "m.gguf", values, [])
    read = open_model(tmp_path / "m.gguf").metadata
    assert dict(read) == values | {"real": float(np.float32(0.1))}
    assert read["true"] is True and isinstance(read["byte"], int)


def test_tensors_lie_aligned_and_are_read_back(tmp_path: Path) -> None:
    data = {f"t{size}": bytes(range(size)) for size in (1, 32, 33)}
    sources = [TensorSource(name, QuantType.I8, (len(item),), partial(bytes, item)) for name, item in data.items()]
    write_gguf(tmp_path / "m.gguf", {"general.alignment": 64}, sources)
    model = open_model(tmp_path / "m.gguf")
    assert {name: tensor.read() for name, tensor in model.tensors.items()} == data
    assert all(tensor.offset % 64 == 0 for tensor in model.tensors.values())


def test_a_golden_file_survives_reading_and_writing(tmp_path: Path) -> None:
    golden = open_model(DATA / "quant/Q4_K_M.gguf")
    sources = [TensorSource(t.name, t.quant_type, t.shape, t.read) for t in golden.tensors.values()]
    write_gguf(tmp_path / "copy.gguf", golden.metadata, sources)
    assert (tmp_path / "copy.gguf").read_bytes() == golden.path.read_bytes()


def test_a_failure_leaves_nothing_behind_and_the_old_file_as_it_was(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("no more weights")

    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no more weights"):
        write_gguf(path, {}, [TensorSource("x", QuantType.F32, (8,), fail)])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    source = TensorSource("x", QuantType.F32, (1 << 20, 1 << 28), bytes)
    with pytest.raises(LlamaclustError, match=r"needs 1073741841 MiB on the disk, but \d+ MiB are free"):
        write_gguf(tmp_path / "m.gguf", {}, [source])
    assert not list(tmp_path.iterdir())
    with pytest.raises(LlamaclustError, match="the folder does not exist"):
        write_gguf(tmp_path / "absent/m.gguf", {}, [])


@pytest.mark.parametrize("quant_type", list(QUANTIZERS), ids=lambda kind: kind.name)
def test_quantizers_of_the_tests_are_near_the_weights(quant_type: QuantType) -> None:
    bound = {
        "F32": 0.0,
        "F16": 1e-7,
        "BF16": 1e-5,
        "Q8_0": 1e-4,
        "Q6_K": 1e-3,
        "Q3_K": 0.05,
        "Q2_K": 0.2,
        "MXFP4": 2e-2,
        "TQ2_0": 0.2,
        "TQ1_0": 0.2,
    }.get(quant_type.name, 1e-2)
    weights = np.random.default_rng(5).standard_normal((16, 512), np.float32)
    read = dequantize(quant_type, quantize(weights, quant_type), weights.size).reshape(weights.shape)
    assert float(np.square(read - weights).mean()) <= bound


def test_tiny_models_are_reproducible(tmp_path: Path) -> None:
    one, two = (build_tiny_model(tmp_path / name, layers=1).read_bytes() for name in ("one.gguf", "two.gguf"))
    assert one == two
