"""Checks that shards of tensors have the bytes of the whole: rows of every expert, whole heads, transposed matrices."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.quant_types import QuantType
from llamaclust.model.shard_names import rows_name, shard_name, whole_name
from support.models.tiny_model import build_tiny_model

EXPERTS, ROWS, WIDTH = 4, 512, 256


@pytest.mark.parametrize("kind", [QuantType.Q4_0, QuantType.Q6_K, QuantType.F16, QuantType.F32])
def test_rows_of_every_expert(tmp_path: Path, kind: QuantType) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source = random.Random(seed)
    file = open_model(build_tiny_model(tmp_path / "m.gguf", quant_type=kind, experts=EXPERTS, layers=1))
    whole = file.tensor("blk.0.ffn_up_exps.weight")
    rows = np.frombuffer(whole.read(), np.uint8).reshape(EXPERTS, ROWS, -1)
    for _ in range(20):
        start, end = sorted(source.sample(range(ROWS + 1), 2))
        name = rows_name(whole.name, range(start, end))
        part = whole.shard(name)
        assert (part.name, whole_name(name), part.shape) == (name, whole.name, (EXPERTS, end - start, WIDTH))
        wanted = rows[:, start:end].tobytes()
        assert part.read() == wanted and part.n_bytes == len(wanted)
        first, last = sorted(source.sample(range(len(wanted) + 1), 2))
        assert part.read_range(first, last) == wanted[first:last]
        assert part.read_range(first, first) == b""


def test_the_same_bytes_at_another_place_are_told_apart(tmp_path: Path) -> None:
    file = open_model(build_tiny_model(tmp_path / "m.gguf", experts=EXPERTS, layers=1))
    whole = file.tensor("blk.0.ffn_up_exps.weight")
    rows = whole.shard(rows_name(whole.name, range(0, ROWS // EXPERTS)))
    expert = whole.shard(shard_name(whole.name, range(1)))
    alike = replace(expert, shape=rows.shape)
    assert (alike.offset, alike.n_bytes, alike.shape) == (rows.offset, rows.n_bytes, rows.shape)
    assert alike.place != rows.place and alike.read() != rows.read()


def test_whole_heads_of_rows_in_halves(tmp_path: Path) -> None:
    file = open_model(build_tiny_model(tmp_path / "m.gguf", layers=1))
    query = replace(file.tensor("blk.0.attn_q.weight"), paired_heads=8)
    rows = np.frombuffer(query.read(), np.uint8).reshape(256, -1)
    for heads in (range(0, 3), range(3, 8), range(7, 8)):
        part = range(32 * heads.start, 32 * heads.stop)
        assert query.shard(shard_name(query.name, part)).read() == rows[part.start : part.stop].tobytes()
    with pytest.raises(AssertionError):
        query.shard(shard_name(query.name, range(16, 64)))


@pytest.mark.parametrize("stored", [(256, 256), (64, 4), (4, 64)])
def test_transposed_matrices_in_parts(stored: tuple[int, int], tmp_path: Path) -> None:
    plain = open_model(build_tiny_model(tmp_path / "m.gguf", layers=1)).tensor("blk.0.attn_q.weight")
    matrices = np.frombuffer(plain.read(), np.uint16).reshape(-1, *stored)
    wanted, tensor = matrices.swapaxes(1, 2).tobytes(), replace(plain, stored=stored)
    assert tensor.read() == wanted != plain.read() and tensor.place != plain.place
    for start, end in ((0, 2), (510, 1030), (4098, 70000), (131070, 131072)):
        assert tensor.read_range(start, end) == wanted[start:end]
