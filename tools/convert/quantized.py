"""Dequantizes quantized checkpoints (four-bit GPTQ and AWQ, eight-bit floats) while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.lazy import Array, Lazy, Recent

_EIGHT_BIT_METHODS: Final = ("fp8", "compressed-tensors")
KEPT_METHOD: Final = "mxfp4"
"""A quantization method whose blocks exist in GGUF. Converters copy the blocks unchanged."""
_SCALES: Final = ("_scale_inv", "_scale")
"""Name suffixes of scales. All scales multiply the weights, even scales named `_scale_inv`."""
_NOT_NEEDED: Final = ("input_scale", "activation_scale")
"""Names of scales of activations. They are not needed, because activations are not quantized."""
_ONE: Final = (1, 1)

_EIGHT: Final = 8
_SHIFTS: Final = np.arange(0, 32, 4, dtype=np.uint32)
_AWQ_ORDER: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Positions of eight consecutive outputs in the int32 into which AWQ packs them."""


def dequantized(tensors: Mapping[str, Lazy], settings: Settings, recent: Recent) -> Mapping[str, Lazy]:
    """Returns the tensors with quantized weights replaced by float weights. Raises ModelFileError if the quantization
    method is not supported."""
    if not settings.has("quantization_config"):
        return tensors
    quantization = settings.inner("quantization_config")
    method = quantization.text("quant_method", default="")
    if method == KEPT_METHOD:
        return tensors
    if method in _EIGHT_BIT_METHODS:
        return _eight_bit(tensors, quantization)
    if method not in ("gptq", "awq"):
        known = ", ".join(("gptq", "awq", *_EIGHT_BIT_METHODS, KEPT_METHOD))
        raise quantization.error("quant_method", f"{shown(method)} is not supported; supported: {known}")
    if quantization.count("bits", "w_bit", default=4, maximum=32) != 4:
        raise quantization.error("bits", f"{quantization.shown('bits')} is not supported; expected 4")
    found = {name: tensor for name, tensor in tensors.items() if not _is_part(name, tensors)}
    # GPTQ stores zero points minus 1, except in version 2.
    zero_offset = 0 if method == "awq" or quantization.text("checkpoint_format", default="gptq") == "gptq_v2" else 1
    for stem in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        found[f"{stem}.weight"] = _four_bit(stem, tensors, recent, is_awq=method == "awq", zero_offset=zero_offset)
    return found


def _is_part(name: str, tensors: Mapping[str, Lazy]) -> bool:
    stem, _, part = name.rpartition(".")
    return part in ("qweight", "qzeros", "scales", "g_idx") and f"{stem}.qweight" in tensors


def _four_bit(stem: str, tensors: Mapping[str, Lazy], recent: Recent, *, is_awq: bool, zero_offset: int) -> Lazy:
    """Dequantizes a matrix of GPTQ or AWQ to [outputs, inputs]. `zero_offset` is added to the stored zero points."""
    weight = tensors[f"{stem}.qweight"]
    if len(weight.shape) != 2:
        raise ModelFileError(f"{weight.origin}: expected a matrix, found shape {list(weight.shape)}")
    inputs, outputs = weight.shape
    inputs, outputs = (inputs, outputs * _EIGHT) if is_awq else (inputs * _EIGHT, outputs)
    zeros, scales, order = _beside(stem, tensors, inputs, outputs)
    steps = _awq_steps if is_awq else _gptq_steps

    def load() -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Returns packed weights, zero points [groups, outputs], scales [groups, outputs] and each input's group."""
        packed = _nibbles(zeros.all())
        if is_awq:
            packed = packed[..., _AWQ_ORDER]
        added = packed.reshape(len(packed), -1).astype(np.float32) + np.float32(zero_offset)
        return weight.all().view(np.uint32), added, scales.floats(), _groups(order, inputs, scales.shape[0])

    def read(start: int, end: int) -> Array:
        packed, added, factors, groups = recent.get(load, load)
        values = steps(packed, start, end).astype(np.float32)
        values -= added[groups, start:end]
        values *= factors[groups, start:end]
        return np.ascontiguousarray(values.T)

    return Lazy((outputs, inputs), Storage.F32, read, weight.origin)


def _beside(stem: str, tensors: Mapping[str, Lazy], inputs: int, outputs: int) -> tuple[Lazy, Lazy, Lazy | None]:
    """Returns a weight's zero points and scales, and each input's group number (None if groups are contiguous)."""
    weight = tensors[f"{stem}.qweight"]
    missing = next((part for part in ("qzeros", "scales") if f"{stem}.{part}" not in tensors), None)
    if missing is not None:
        raise ModelFileError(f"{weight.origin}: its {missing} is missing")
    zeros, scales, order = tensors[f"{stem}.qzeros"], tensors[f"{stem}.scales"], tensors.get(f"{stem}.g_idx")
    groups = scales.shape[0]
    fits = scales.shape == (groups, outputs) and zeros.shape == (groups, outputs // _EIGHT) and inputs % groups == 0
    typed = weight.storage is zeros.storage is Storage.I32 and scales.storage.is_real
    if not fits or not typed or outputs % _EIGHT or (order is not None and order.shape != (inputs,)):
        shapes = f"{list(weight.shape)}, zeros {list(zeros.shape)} and scales {list(scales.shape)}"
        raise ModelFileError(f"{weight.origin}: shapes do not fit together: {shapes}")
    return zeros, scales, order


def _groups(order: Lazy | None, inputs: int, count: int) -> NDArray[np.int64]:
    if order is None:
        return np.arange(inputs, dtype=np.int64) // (inputs // count)
    groups = order.all().astype(np.int64)
    if groups.min() < 0 or groups.max() >= count:
        raise ModelFileError(f"{order.origin}: group {groups.max()} does not exist: there are {count}, numbered from 0")
    return groups


def _gptq_steps(packed: NDArray[np.uint32], start: int, end: int) -> NDArray[np.uint8]:
    return _nibbles(packed[:, start:end].T).reshape(end - start, -1).T


def _awq_steps(packed: NDArray[np.uint32], start: int, end: int) -> NDArray[np.uint8]:
    first = start // _EIGHT
    steps = _nibbles(packed[:, first : -(-end // _EIGHT)])[..., _AWQ_ORDER].reshape(len(packed), -1)
    return steps[:, start - first * _EIGHT : end - first * _EIGHT]


def _nibbles(packed: Array) -> NDArray[np.uint8]:
    """Splits 32-bit numbers [..., n] into four-bit numbers [..., n, 8], starting with the lowest bits."""
    return ((packed.view(np.uint32)[..., None] >> _SHIFTS) & np.uint32(15)).astype(np.uint8)


def _eight_bit(tensors: Mapping[str, Lazy], quantization: Settings) -> dict[str, Lazy]:
    block = _block(quantization)
    found = {}
    for name, tensor in tensors.items():
        if _is_scale(name, tensors):
            continue
        scales = next((tensors[f"{name}{end}"] for end in _SCALES if f"{name}{end}" in tensors), None)
        if scales is None:
            found[name] = tensor
        else:
            found[name] = (_scaled_experts if len(tensor.shape) == 3 else _scaled)(tensor, scales, block)
    return found


def _is_scale(name: str, tensors: Mapping[str, Lazy]) -> bool:
    stem, _, part = name.rpartition(".")
    ends = (*_SCALES, *(f"_{end}" for end in _NOT_NEEDED))
    behind = any(name.endswith(end) and name.removesuffix(end) in tensors for end in ends)
    return behind or (part in _NOT_NEEDED and f"{stem}.weight" in tensors)


def _block(quantization: Settings) -> tuple[int, int] | None:
    value = quantization.values.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise quantization.error("weight_block_size", "expected two whole numbers")
    both = Settings(dict(zip(("rows", "columns"), value, strict=True)), quantization.origin)
    return both.count("rows"), both.count("columns")


def _scaled(tensor: Lazy, scales: Lazy, block: tuple[int, int] | None) -> Lazy:
    if len(tensor.shape) != 2 or tensor.storage is not Storage.U8 or not scales.storage.is_real:
        kinds = f"{tensor.storage.name} {list(tensor.shape)}, scales {scales.storage.name}"
        raise ModelFileError(f"{tensor.origin}: expected an eight-bit float matrix and its scales, found {kinds}")
    rows, columns = tensor.shape
    shape = (*scales.shape, 1)[:2]
    sizes = {_ONE: (rows, columns), (rows, 1): (1, columns)}
    if block is not None:
        sizes = {(-(-rows // block[0]), -(-columns // block[1])): block}
    if shape not in sizes or len(scales.shape) > 2:
        raise ModelFileError(
            f"{tensor.origin}: scales of shape {list(scales.shape)} do not fit {rows} rows of {columns}"
        )
    height, width = min(sizes[shape][0], rows), min(sizes[shape][1], columns)

    def read(start: int, end: int) -> Array:
        first = start // height
        each = scales.floats().reshape(shape)[first : -(-end // height)]
        rows_of = np.arange(start, end) // height - first
        with np.errstate(over="ignore", invalid="ignore"):  # The writer checks values against the output type.
            values: Array = E4M3[tensor.read(start, end)] * np.repeat(each, width, axis=1)[rows_of, :columns]
        return values

    return Lazy(tensor.shape, Storage.F32, read, tensor.origin)


def _scaled_experts(tensor: Lazy, scales: Lazy, block: tuple[int, int] | None) -> Lazy:
    if tensor.storage is not Storage.U8 or not scales.storage.is_real:
        kinds = f"{tensor.storage.name} and {scales.storage.name}"
        raise ModelFileError(f"{tensor.origin}: expected eight-bit floats and scales, found {kinds}")
    count, rows, columns = tensor.shape
    height, width = block or (rows, columns)
    blocks = (-(-rows // height), -(-columns // width))
    shape = (1, 1, 1) if scales.shape in ((), (1,)) else (*scales.shape, 1, 1)[:3]
    if shape not in ((1, 1, 1), (count, 1, 1), (count, *blocks)) or len(scales.shape) > 3:
        raise ModelFileError(f"{tensor.origin}: scales of shape {list(scales.shape)} do not fit {list(tensor.shape)}")
    if shape[1:] == (1, 1):
        height, width = rows, columns

    def read(start: int, end: int) -> Array:
        each = np.broadcast_to(scales.floats().reshape(shape), (count, *shape[1:]))[start:end]
        spread = each.repeat(height, axis=1)[:, :rows].repeat(width, axis=2)[:, :, :columns]
        with np.errstate(over="ignore", invalid="ignore"):  # The writer checks values against the output type.
            values: Array = E4M3[tensor.read(start, end)] * spread
        return values

    return Lazy(tensor.shape, Storage.F32, read, tensor.origin)


def _all_numbers() -> Array:
    """Returns the E4M3 value of each byte from 0 to 255."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(8.0 + fraction, exponent - 10))
    size[byte & 127 == 127] = np.nan
    numbers: Array = np.where(byte < 128, size, -size).astype(np.float32)
    return numbers


E4M3: Final = _all_numbers()
