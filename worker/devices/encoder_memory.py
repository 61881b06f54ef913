"""Computes the memory of an image encoder without loading it."""

from __future__ import annotations

from math import prod

from llamaclust.kernels.backend import kv_bytes
from llamaclust.model.projectors.projector import Projector
from llamaclust.model.projectors.tiles import input_bytes
from llamaclust.worker.devices.encoder_limits import EncoderMemory, encoder_limits

_FLOAT_BYTES = 4


def encoder_bytes(projector: Projector, threads: int) -> EncoderMemory:
    """Returns the memory of an encoder on the CPU. Raises ModelFileError if the CPU has no kernels for the encoder."""
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
    """Returns the larger of the memory to prepare a tile's patches and the memory of its patches and output rows."""
    program, rows = projector.program, projector.most_program_rows
    patches = _FLOAT_BYTES * rows * program.hidden.width
    # Each number takes a float32, and a byte that tells whether the float is finite.
    merged = (_FLOAT_BYTES + 1) * (rows // program.rows_together) * program.out.width
    return max(input_bytes(projector), patches + merged)
