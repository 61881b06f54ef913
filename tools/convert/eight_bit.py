"""Dequantizes 8-bit floats (E4M3) with separate scales while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.tools.convert.lazy import Array, Lazy, Storage
from llamaclust.tools.convert.settings import MAX_WIDTH, Settings

EIGHT_BIT_METHODS: Final = ("fp8", "compressed-tensors")
_SCALES: Final = ("weight_scale_inv", "weight_scale")
"""By the first name, too, they are what weights are multiplied with."""
_NOT_NEEDED: Final = ("input_scale", "activation_scale")
"""Activations keep their own precision here."""
_ONE: Final = (1, 1)


def with_floats(tensors: Mapping[str, Lazy], said: Settings) -> dict[str, Lazy]:
    """The same tensors, those with a scale as float32; ModelFileError where a scale does not fit."""
    block = _block(said)
    found = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part in (*_SCALES, *_NOT_NEEDED) and f"{stem}.weight" in tensors:
            continue
        scales = next((tensors[f"{stem}.{scale}"] for scale in _SCALES if f"{stem}.{scale}" in tensors), None)
        found[name] = tensor if part != "weight" or scales is None else _scaled(tensor, scales, block)
    return found


def _block(said: Settings) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where a configuration says so."""
    value = said.values.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise said.error("weight_block_size", "two whole numbers expected")
    both = Settings(dict(zip(("rows", "columns"), value, strict=True)), said.origin)
    return both.count("rows", maximum=MAX_WIDTH), both.count("columns", maximum=MAX_WIDTH)


def _scaled(tensor: Lazy, scales: Lazy, block: tuple[int, int] | None) -> Lazy:
    """A scale for each block, for each row, or for the whole matrix, recognized by its shape."""
    if len(tensor.shape) != 2 or tensor.storage is not Storage.U8 or not scales.storage.is_real:
        kinds = f"{tensor.storage.name} {list(tensor.shape)}, scales {scales.storage.name}"
        raise ModelFileError(f"{tensor.origin}: {kinds}: no matrix of eight-bit floats with its scales")
    rows, columns = tensor.shape
    shape = (*scales.shape, 1)[:2]
    sizes = {_ONE: (rows, columns), (rows, 1): (1, columns)}
    if block is not None:
        sizes = {(-(-rows // block[0]), -(-columns // block[1])): block}
    if shape not in sizes or len(scales.shape) > 2:
        raise ModelFileError(f"{tensor.origin}: scales of shape {list(scales.shape)} for {rows} rows of {columns}")
    height, width = min(sizes[shape][0], rows), min(sizes[shape][1], columns)

    def read(start: int, end: int) -> Array:
        first = start // height
        each = scales.floats().reshape(shape)[first : -(-end // height)]
        rows_of = np.arange(start, end) // height - first
        with np.errstate(over="ignore", invalid="ignore"):  # the type that is written decides what may be
            values: Array = E4M3[tensor.read(start, end)] * np.repeat(each, width, axis=1)[rows_of, :columns]
        return values

    return Lazy(tensor.shape, Storage.F32, read, tensor.origin)


def _all_numbers() -> Array:
    """Four bits of exponent, biased by 7, three of fraction; all ones are no number, and there are no infinities."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(8.0 + fraction, exponent - 10))
    size[byte & 127 == 127] = np.nan
    numbers: Array = np.where(byte < 128, size, -size).astype(np.float32)
    return numbers


E4M3: Final = _all_numbers()
"""What each byte stands for."""
