"""Weights of the CPU backend: what a program takes tensors for, which of them can be computed with, and what they
become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels._native import PackedMatrix, quant_types
from llamaclust.kernels.backend import Float32
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.mixtures.steps import shard_name
from llamaclust.model.program import (
    Adapt,
    AddPosition,
    AddRow,
    Attention,
    Convolution,
    Decay,
    Embed,
    ExpertChoice,
    ExpertDown,
    ExpertInner,
    ExpertShards,
    HeadMatMul,
    LayerNorm,
    MatMul,
    Moe,
    Program,
    RmsNorm,
    ScaleByWeight,
    Scan,
    SigmoidGate,
    Step,
)
from llamaclust.model.quant_types import QuantType

SUPPORTED_TYPES = tuple(map(QuantType, quant_types()))
_VECTOR_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)


def _shapes(step: Step) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that it takes, and in which shape; -1 stands for any number of rows."""
    match step:
        case Embed():
            yield step.weight, (-1, step.out.width)
        case RmsNorm(weight=str(weight)):
            yield weight, (step.heads, step.width) if step.own_weights else (step.width,)
        case LayerNorm():
            yield step.weight, (step.x.width,)
            if step.bias is not None:
                yield step.bias, (step.x.width,)
        case Attention(sinks=str(sinks)):
            yield sinks, (step.heads,)
        case Convolution():
            yield step.weight, (step.x.width, step.taps)
            if step.bias is not None:
                yield step.bias, (step.x.width,)
        case Decay():
            yield step.weight, step.weight_shape
            yield step.bias, (step.x.width,)
        case Scan():
            yield step.bias, (step.heads,)
            yield from ((name, (step.heads, 1)) for name in (step.decay, step.skip))
        case AddPosition() | AddRow():
            yield step.weight, (-1, step.out.width)
        case SigmoidGate():
            yield step.weight, (step.x.width,)
        case ScaleByWeight():
            yield step.weight, (step.x.width if step.by_channel else 1,)
        case MatMul():
            yield step.weight, (step.out.width, step.x.width)
            if step.bias is not None:
                yield step.bias, (step.out.width,)
        case HeadMatMul():
            yield step.weight, step.shape
        case Adapt():
            yield step.down, (step.rank, step.x.width)
            yield step.up, (step.out.width, step.rank)
        case Moe():
            yield step.router, (step.experts, (step.routed or step.x).width)
            yield from (*_inner_shapes(step), *_down_shapes(step), *_choice_vectors(step))
        case ExpertChoice(mixture):
            yield mixture.router, (mixture.experts, step.x.width)
            yield from _choice_vectors(mixture)
        case ExpertInner(mixture):
            yield from _inner_shapes(mixture)
        case ExpertDown(mixture):
            yield from _down_shapes(mixture)
        case ExpertShards(mixture):
            for name, shape in (*_inner_shapes(mixture), *_down_shapes(mixture)):
                yield from ((shard_name(name, shard), (len(shard), *shape[1:])) for shard in step.shards)


def _choice_vectors(step: Moe) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = step.router_bias, step.selection_bias, step.expert_scales
    yield from ((name, (step.experts,)) for name in names if name is not None)


def _inner_shapes(step: Moe) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((name, (step.experts, step.inner_width, step.x.width)) for name in step.inner)
    biases = step.gate_bias, step.up_bias
    yield from ((name, (step.experts, step.ffn_width)) for name in biases if name is not None)


def _down_shapes(step: Moe) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield step.down, (step.experts, step.out.width, step.ffn_width)
    if step.down_bias is not None:
        yield step.down_bias, (step.experts, step.out.width)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Weight:
    """A loaded tensor: a vector of float32, or packed matrices (one, or one for each expert); or a stand-in for one."""

    quant_type: QuantType
    matrices: tuple[PackedMatrix, ...] = ()
    vector: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    is_shape_only: bool = False
    tiles: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))  # of all matrices, in their order

    @property
    def matrix(self) -> PackedMatrix:
        (matrix,) = self.matrices
        return matrix

    @property
    def n_bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices) + self.vector.nbytes


def shapes_only(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Stand-ins for the weights of a program, for planning. ModelFileError as for `check_weights`."""
    check_weights(program, tensors)
    return {name: _shape_only(tensors[name]) for name in program.weights}


def _shape_only(tensor: Tensor) -> Weight:
    if len(tensor.shape) == 1:
        return Weight(tensor.quant_type, vector=np.zeros(tensor.shape, np.float32))
    *count, rows, cols = tensor.shape
    shape = PackedMatrix.shape_only(int(tensor.tile_type), rows, cols)
    return Weight(tensor.tile_type, (shape,) * prod(count), is_shape_only=True)


def check_weights(program: Program, tensors: Mapping[str, Tensor]) -> None:
    """ModelFileError for a tensor of the wrong shape or of a type without kernels. Reads no weights."""
    for step in program.steps:
        for name, wanted in _shapes(step):
            _check(tensors[name], wanted)


def _check(tensor: Tensor, wanted: tuple[int, ...]) -> None:
    allowed = _VECTOR_TYPES if len(wanted) == 1 else SUPPORTED_TYPES
    if tensor.quant_type not in allowed:
        known = ", ".join(kind.name for kind in allowed)
        what = f"type {tensor.quant_type.name} cannot be computed with on cpu, only {known}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; take another file of the model")
    fits = len(wanted) == len(tensor.shape) and all(map(_is_size, wanted, tensor.shape))
    if not fits or max(tensor.shape) >= 1 << 31:
        sizes = [size if size >= 0 else "any" for size in wanted]
        what = f"shape {list(tensor.shape)}, the model's own figures ask for {sizes}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; the file is damaged")


def _is_size(wanted: int, found: int) -> bool:
    return wanted in (-1, found)
