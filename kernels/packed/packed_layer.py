from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from llamaclust.kernels._native import Memory, PackedMatrix
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model.gguf.tensors import Tensor


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Matrices that are stored one after another: all matrices of one layer, or one matrix outside the layers."""

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.resident_bytes for tensor in self.tensors)

    @property
    def offsets(self) -> Iterator[tuple[Tensor, int]]:
        return zip(
            self.tensors, accumulate((tensor.resident_bytes for tensor in self.tensors), initial=0), strict=False
        )

    def weights(self, memory: Memory) -> dict[str, Weight]:
        weights = {}
        for tensor, offset in self.offsets:
            *count, rows, cols = tensor.shape
            offsets = range(offset, offset + tensor.resident_bytes, tensor.resident_bytes // prod(count))
            matrices = (PackedMatrix(int(tensor.tile_type), rows, cols, memory, at) for at in offsets)
            tiles = memory.view[offset : offset + tensor.resident_bytes]
            weights[tensor.name] = Weight(tensor.tile_type, tuple(matrices), tiles=tiles)
        return weights


def by_layer(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.layer or tensor.name, []).append(tensor)
    return groups


def packed_layers_of(tensors: Iterable[Tensor]) -> list[PackedLayer]:
    groups = by_layer(tensor for tensor in tensors if len(tensor.shape) > 1)
    return [PackedLayer(name, tuple(group)) for name, group in groups.items()]
