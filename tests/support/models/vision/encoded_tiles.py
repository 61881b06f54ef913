"""Encodes a tile with a projector file on any backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Batch, Float32
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.projectors.projector import open_projector
from llamaclust.model.projectors.tiles import EncoderInputs, TileReader


def encoded(backend: Backend, path: Path, tile: NDArray[np.uint8]) -> Float32:
    """Returns the text model's rows [rows, channels], line by line."""
    projector = open_projector(path)
    inputs = TileReader(projector).inputs(tile)
    stage = backend.load(projector.program, projector.tensors, limits_of(inputs), lambda done_bytes: None)
    rows = inputs.in_lines(stage.run(batch_of_tile(inputs), inputs.patches).copy())
    stage.close()
    assert rows.shape == (projector.rows_of(*tile.shape[:2]), projector.width * projector.levels)
    return rows


def limits_of(inputs: EncoderInputs) -> StageLimits:
    rows = len(inputs.patches)
    return StageLimits(
        max_batch_tokens=rows,
        max_outputs=1,
        max_sequences=1,
        max_context_tokens=rows,
        kv_blocks=_blocks(rows),
    )


def batch_of_tile(inputs: EncoderInputs) -> Batch:
    rows = len(inputs.patches)
    return Batch(
        tokens=np.zeros(rows, np.int32),
        positions=np.arange(rows, dtype=np.int32),
        sequence_starts=np.array([0, rows], np.int32),
        table_starts=np.array([0, _blocks(rows)], np.int32),
        block_tables=np.arange(_blocks(rows), dtype=np.int32),
        output_rows=np.empty(0, np.int32),
        rope_positions=inputs.rope_positions,
        groups=inputs.groups,
    )


def _blocks(rows: int) -> int:
    return -(-rows // KV_BLOCK_TOKENS)
