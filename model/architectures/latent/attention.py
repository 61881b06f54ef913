"""Latent attention (MLA). Keys and values are projections of one short vector, and KV memory stores only this vector.
In the absorbed form, queries are multiplied by the key matrix, and results by the value matrix. Prefill uses the
absorbed form too, so that results do not depend on chunk sizes. (DeepSeek-V2, arXiv 2405.04434, section 2.1.)"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model import program as ir
from llamaclust.model.architectures.tensors import CheckedTensors
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.steps.options import RopeStyle


@dataclass(frozen=True, slots=True)
class LatentVariant:
    """Options of latent attention (MLA), with widths in channels. A key has `latent` channels without RoPE, followed by
    `rotated` channels with RoPE. `query_rank` is the width of the latent query (0 means none). A `table` of None means
    no RoPE."""

    latent: int
    rotated: int
    query: int
    value: int
    query_rank: int
    scale: float
    epsilon: float
    style: RopeStyle = RopeStyle.NORM
    table: RopeTable | None = None
    temperature: tuple[float, int] | None = None

    @property
    def key(self) -> int:
        return self.latent + self.rotated


@dataclass(frozen=True, slots=True)
class LatentAttention:
    tensors: CheckedTensors
    layer: int
    heads: int
    variant: LatentVariant
    kv_type: KvType

    def steps(self, width: int) -> Iterator[ir.Step]:
        hidden, normed, projected = (Buffer(name, width) for name in ("hidden", "normed", "projected"))
        variant, heads = self.variant, self.heads
        query, key = Buffer("query", heads * variant.key), Buffer("key", variant.key)
        attended, result = Buffer("by head", heads * variant.latent), Buffer("values", heads * variant.value)
        yield self._norm("attn_norm", hidden, normed)
        yield from self._queries(normed, query)
        yield from self._keys(normed, key)
        yield ir.Attention(
            *(query, key, None, attended, self.layer),
            heads=heads,
            kv_heads=1,
            head_dim=variant.key,
            scale=variant.scale,
            kv_type=self.kv_type,
        )
        yield self._by_head("attn_v_b", attended, result)
        yield self._product("attn_output", result, projected)
        yield ir.Add(hidden, projected, hidden)

    def _queries(self, normed: Buffer, query: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of all heads' queries. Channels without RoPE are multiplied by the key matrix."""
        variant, heads = self.variant, self.heads
        x, name = normed, "attn_q"
        if variant.query_rank:
            x, name = Buffer("query latent", variant.query_rank), "attn_q_b"
            yield self._product("attn_q_a", normed, x)
            yield self._norm("attn_q_a_norm", x, x)
        whole = Buffer("query parts", heads * variant.query)
        plain, rotated = (
            Buffer("plain query", whole.width - heads * variant.rotated),
            Buffer("rotated query", heads * variant.rotated),
        )
        absorbed = Buffer("by head", heads * variant.latent)  # The attention's results overwrite this buffer later.
        yield self._product(name, x, whole)
        yield ir.Slice(whole, plain, 0, heads)
        yield ir.Slice(whole, rotated, plain.width // heads, heads)
        yield from self._rotation(rotated, heads)
        yield self._by_head("attn_k_b", plain, absorbed)
        yield ir.Join(absorbed, rotated, query, heads)
        if variant.temperature is not None:
            yield ir.PositionScale(query, query, *variant.temperature)

    def _keys(self, normed: Buffer, key: Buffer) -> Iterator[ir.Step]:
        """Yields the steps that compute the key: the normed latent vector, followed by the channels with RoPE."""
        whole = Buffer("key parts", key.width)
        latent, rotated = Buffer("latent", self.variant.latent), Buffer("rotated key", self.variant.rotated)
        yield self._product("attn_kv_a_mqa", normed, whole)
        yield ir.Slice(whole, latent, 0)
        yield self._norm("attn_kv_a_norm", latent, latent)
        yield ir.Slice(whole, rotated, latent.width)
        yield from self._rotation(rotated, 1)
        yield ir.Join(latent, rotated, key)

    def _rotation(self, x: Buffer, heads: int) -> Iterator[ir.Step]:
        if self.variant.table is not None:
            yield ir.Rope(x, heads, self.variant.rotated, self.variant.style, self.variant.table)

    def _norm(self, name: str, x: Buffer, out: Buffer) -> ir.Step:
        return ir.RmsNorm(x, out, self.tensors.vector(self._tensor(name), x.width), self.variant.epsilon)

    def _product(self, name: str, x: Buffer, out: Buffer) -> ir.Step:
        return ir.MatMul(x, out, self.tensors.weight(self._tensor(name), (out.width, x.width)))

    def _by_head(self, name: str, x: Buffer, out: Buffer) -> ir.Step:
        product = ir.HeadMatMul(x, out, self._tensor(name), self.heads)
        self.tensors.weight(product.weight, product.shape)
        return product

    def _tensor(self, name: str) -> str:
        return f"blk.{self.layer}.{name}.weight"
