"""Tensors and keys of layers with a gated delta net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny_model import RandomTensor, matrix, norm


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """A gated delta net. `old`: q, k, v and z are one tensor; `joined`: beta and alpha are one."""

    heads: int = 4
    key_heads: int = 2
    dim: int = 16
    taps: int = 4
    old: bool = False
    joined: bool = False

    def keys(self) -> Mapping[str, WritableValue]:
        return {
            "ssm.conv_kernel": self.taps,
            "ssm.inner_size": self.heads * self.dim,
            "ssm.state_size": self.dim,
            "ssm.time_step_rank": self.heads,
            "ssm.group_count": self.key_heads,
        }

    def tensors(self, name: str, hidden: int) -> Iterator[RandomTensor]:
        value = self.heads * self.dim
        mixed = 2 * self.key_heads * self.dim + value
        products = {"ssm_in": mixed + value} if self.old else {"attn_qkv": mixed, "attn_gate": value}
        gates = {"ssm_ba": 2 * self.heads} if self.joined else {"ssm_beta": self.heads, "ssm_alpha": self.heads}
        for part, width in (products | gates).items():
            yield matrix(f"{name}.{part}", width, hidden, gain=1.5)
        yield RandomTensor(f"{name}.ssm_conv1d.weight", (mixed, self.taps), 0.7)
        yield RandomTensor(f"{name}.ssm_dt.bias", (self.heads,), 0.5)
        yield RandomTensor(f"{name}.ssm_a", (self.heads,), 0.1, mean=-0.3)
        yield norm(f"{name}.ssm_norm", self.dim)
        yield matrix(f"{name}.ssm_out", hidden, value)


@dataclass(frozen=True, slots=True)
class KimiDelta:
    """A delta net of Kimi Linear, whose decay differs by channel."""

    heads: int = 4
    dim: int = 16
    taps: int = 4

    def keys(self) -> Mapping[str, WritableValue]:
        return {"ssm.conv_kernel": self.taps, "kda.head_dim": self.dim}

    def tensors(self, name: str, hidden: int) -> Iterator[RandomTensor]:
        inner = self.heads * self.dim
        for part in "qkv":
            yield matrix(f"{name}.attn_{part}", inner, hidden, gain=1.5)
            yield RandomTensor(f"{name}.ssm_conv1d_{part}.weight", (1, inner, 1, self.taps), 0.7)
        for part in "fg":
            yield matrix(f"{name}.ssm_{part}_a", self.dim, hidden, gain=1.5)
            yield matrix(f"{name}.ssm_{part}_b", inner, self.dim, gain=1.5)
        yield matrix(f"{name}.ssm_beta", self.heads, hidden, gain=1.5)
        yield RandomTensor(f"{name}.ssm_dt.bias", (inner,), 0.5)
        yield RandomTensor(f"{name}.ssm_a", (1, 1, self.heads, 1), 0.1, mean=-0.3)
        yield norm(f"{name}.ssm_norm", self.dim)
        yield matrix(f"{name}.attn_output", hidden, inner)
