"""Tests of importance matrices in both formats, and of invalid files."""

from __future__ import annotations

from pathlib import Path
from struct import pack

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from llamaclust.model.quant_types import QuantType


def _matrix() -> ImportanceMatrix:
    random = np.random.default_rng(3)
    dense = Importance(random.random((1, 8), np.float32), np.array([96], np.float32))
    experts = Importance(random.random((3, 4), np.float32), np.array([64, 0, 32], np.float32))
    return ImportanceMatrix({"blk.0.attn_q.weight": dense, "blk.0.ffn_up_exps.weight": experts}, 3, 32, ("a text",))


@pytest.mark.parametrize("name", ["matrix.gguf", "matrix.dat"])
def test_both_formats_come_back(tmp_path: Path, name: str) -> None:
    path, wanted = tmp_path / name, _matrix()
    write_imatrix(path, wanted)
    read = read_imatrix(path)
    assert read.chunks == 3 and read.datasets == ("a text",) and set(read.entries) == set(wanted.entries)
    for entry, means in ((name, one.means) for name, one in wanted.entries.items()):
        np.testing.assert_allclose(read.entries[entry].means.reshape(means.shape), means, rtol=1e-6)
    assert (wanted.entries["blk.0.ffn_up_exps.weight"].means[1] == 1).all()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _legacy(count: int = 1, length: int = 4, calls: int = 1, values: int = 2, data: bytes = bytes(8)) -> bytes:
    return pack("<ii", count, length) + b"name" + pack("<ii", calls, values) + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends at byte 0"),
        (b"\1", "ends at byte 1"),
        (pack("<i", 0), "no entries"),
        (pack("<i", -1), "no entries"),
        (_legacy(length=-4), "the length -4"),
        (_legacy(length=1 << 30), "the length 1073741824"),
        (_legacy(values=1 << 29), "the length -?2147483648"),
        (_legacy(values=-2), "the length -8"),
        (_legacy(count=5), "ends at byte 28"),
        (_legacy(data=pack("<ff", 1, float("nan"))), "not numbers"),
        (_legacy(data=pack("<ff", 1, float("inf"))), "not numbers"),
        (_legacy(data=pack("<ff", 1, -1)), "negative"),
        (pack("<ii", 1, 4) + b"\xff\xff\xff\xff" + pack("<ii", 1, 2) + bytes(8), "is not valid UTF-8"),
        (b"GGUF", "the file ends at byte 4"),
    ],
)
def test_files_that_are_no_matrix(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "matrix.dat"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=says) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "shapes", "says"),
    [
        ({"general.type": "model"}, {"a.in_sum2": (1, 4), "a.counts": (1, 1)}, "expected general.type 'imatrix'"),
        (
            {"general.type": np.array([1, 2], np.uint32)},
            {"a.in_sum2": (1, 4)},
            "expected general.type 'imatrix', found None",
        ),
        ({}, {"a.in_sum2": (1, 4), "a.counts": (1, 1)}, "expected general.type 'imatrix'"),
        ({"general.type": "imatrix"}, {"a.counts": (1, 1)}, "no entries"),
        ({"general.type": "imatrix"}, {"a.in_sum2": (1, 4)}, "a.counts.*missing"),
        ({"general.type": "imatrix"}, {"a.in_sum2": (2, 4), "a.counts": (3, 1)}, "counts"),
    ],
)
def test_gguf_files_that_are_no_matrix(
    tmp_path: Path, metadata: dict[str, WritableValue], shapes: dict[str, tuple[int, ...]], says: str
) -> None:
    path = tmp_path / "matrix.gguf"
    sources = [
        TensorSource(name, QuantType.F32, shape, np.ones(shape, np.float32).tobytes) for name, shape in shapes.items()
    ]
    write_gguf(path, metadata, sources)
    with pytest.raises(ModelFileError, match=says):
        read_imatrix(path)
