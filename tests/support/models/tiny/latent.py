"""Tensors and keys of latent attention in small models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny_model import RandomTensor, matrix, norm


@dataclass(frozen=True, slots=True)
class Latent:
    """Widths of latent attention, as in `LatentVariant`; a query's first `plain` channels are not rotated."""

    latent: int = 32
    rotated: int = 8
    plain: int = 32
    value: int = 24
    query_rank: int = 0

    def tensors(self, layer: str, hidden: int, heads: int) -> Iterator[RandomTensor]:
        query = heads * (self.plain + self.rotated)
        if self.query_rank:
            yield matrix(f"{layer}.attn_q_a", self.query_rank, hidden)
            yield norm(f"{layer}.attn_q_a_norm", self.query_rank)
            yield matrix(f"{layer}.attn_q_b", query, self.query_rank, gain=1.5)
        else:
            yield matrix(f"{layer}.attn_q", query, hidden, gain=1.5)
        yield matrix(f"{layer}.attn_kv_a_mqa", self.latent + self.rotated, hidden, gain=1.5)
        yield norm(f"{layer}.attn_kv_a_norm", self.latent)
        yield matrix(f"{layer}.attn_k_b", heads, self.latent, self.plain)
        yield matrix(f"{layer}.attn_v_b", heads, self.value, self.latent)
        yield matrix(f"{layer}.attn_output", hidden, heads * self.value)

    def keys(self) -> dict[str, WritableValue]:
        """Returns keys of the widths, which replace those of other attention."""
        rank: dict[str, WritableValue] = {"attention.q_lora_rank": self.query_rank} if self.query_rank else {}
        return rank | {
            "attention.head_count_kv": 1,
            "attention.key_length": self.latent + self.rotated,
            "attention.value_length": self.latent,
            "attention.kv_lora_rank": self.latent,
            "attention.key_length_mla": self.plain + self.rotated,
            "attention.value_length_mla": self.value,
            "rope.dimension_count": self.rotated,
        }
