"""Mamba 2 blocks of small random models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny_model import RandomTensor, matrix


@dataclass(frozen=True, slots=True)
class Mamba:
    """The sizes of Mamba 2 blocks and the layers that have them."""

    layers: tuple[int, ...]
    inner: int = 128
    heads: int = 8
    groups: int = 1
    state_size: int = 16
    taps: int = 4
    has_norm: bool = True
    bare_norm: str | None = None  # a layer norm whose name lacks `.weight`

    def keys(self) -> dict[str, WritableValue]:
        return {
            "ssm.conv_kernel": self.taps,
            "ssm.inner_size": self.inner,
            "ssm.state_size": self.state_size,
            "ssm.time_step_rank": self.heads,
            "ssm.group_count": self.groups,
        }

    def tensors(self, name: str, hidden: int) -> Iterator[RandomTensor]:
        if self.bare_norm is not None:
            yield RandomTensor(f"{name}.{self.bare_norm}", (hidden,), 0.1, mean=1.0)
        convolved = self.inner + 2 * self.groups * self.state_size
        yield matrix(f"{name}.ssm_in", self.inner + convolved + self.heads, hidden, gain=1.5)
        yield RandomTensor(f"{name}.ssm_conv1d.weight", (convolved, self.taps), 0.5)
        yield RandomTensor(f"{name}.ssm_conv1d.bias", (convolved,), 0.3)
        yield RandomTensor(f"{name}.ssm_dt.bias", (self.heads,), 1.0, mean=-1.0)
        yield RandomTensor(f"{name}.ssm_a", (self.heads, 1), 0.1, mean=-0.5)
        yield RandomTensor(f"{name}.ssm_d", (self.heads, 1), 0.3, mean=1.0)
        if self.has_norm:
            yield RandomTensor(f"{name}.ssm_norm.weight", (self.groups, self.inner // self.groups), 0.3, mean=1.0)
        yield matrix(f"{name}.ssm_out", hidden, self.inner)
