"""Computes the memory that an image encoder takes on a worker. Nothing is loaded."""

from __future__ import annotations

from math import prod

from llamaclust.kernels.backend import kv_bytes
from llamaclust.model.projectors.projector import Projector
from llamaclust.model.projectors.tiles import input_bytes
from llamaclust.worker.devices.encoder_limits import EncoderMemory, encoder_limits

_FLOAT_BYTES = 4


def encoder_bytes(projector: Projector, threads: int) -> EncoderMemory:
    """Returns the memory of an encoder on `threads` processor threads. Workers with GPUs also run encoders on the
    processor. Raises ModelFileError if the projector has no kernels."""
    from llamaclust.kernels.cpu.backend import workspace_bytes

    program, tensors, limits = projector.program, projector.tensors, encoder_limits(projector)
    computed_bytes = workspace_bytes(program, tensors, limits, threads) + kv_bytes(program, limits)
    return EncoderMemory(
        weight_bytes=sum(tensor.resident_bytes for tensor in tensors.values()) + _input_bytes(projector),
        workspace_bytes=computed_bytes + _tile_bytes(projector),
    )


def _input_bytes(projector: Projector) -> int:
    names = {*projector.read_names} - {*projector.program.weights}
    return sum(_FLOAT_BYTES * prod(projector.file.tensor(name).shape) for name in names)


def _tile_bytes(projector: Projector) -> int:
    """Returns the bytes for preparing a tile's patches, or the bytes of its patches and rows if these are more. The
    rows take one more byte per number, which tells whether the number is finite."""
    program, rows = projector.program, projector.most_program_rows
    patches = _FLOAT_BYTES * rows * program.hidden.width
    merged = (_FLOAT_BYTES + 1) * (rows // program.rows_together) * program.out.width
    return max(input_bytes(projector), patches + merged)
