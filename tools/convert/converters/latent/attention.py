"""Converts latent attention. GGUF splits the matrix that computes keys and values from the latent vector into
`attn_k_b` and `attn_v_b`, each with one matrix per head. The matrices of `attn_k_b` are transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llamaclust.tools.convert.lazy import exchanged, in_groups, part_of_each
from llamaclust.tools.convert.page import Page

_MAX_HEAD: Final = 1 << 12
_MAX_RANK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Latent:
    """Numbers of channels of the latent vector (`rank`), of a key (`rotated` plus `plain`) and of a value. `query_rank`
    is 0 if queries are not computed from a latent vector."""

    rank: int
    rotated: int
    plain: int
    value: int
    query_rank: int


def read_latent(page: Page) -> Latent:
    """Reads the sizes of latent attention. Raises ModelFileError for attention that GGUF cannot express."""
    settings = page.settings
    if settings.flag("attention_bias"):
        raise settings.error("attention_bias", f"true is not supported by {page.architecture}")
    if not settings.flag("rope_interleave", default=True):
        raise settings.error(
            "rope_interleave", "false is not supported; supported is a rotation of neighbouring channels"
        )
    if page.kv_heads != page.heads:
        raise settings.error(
            "num_key_value_heads",
            f"expected {page.heads} as for queries, found {page.kv_heads}: latent attention has no groups",
        )
    rotated = settings.count("qk_rope_head_dim", maximum=_MAX_HEAD)
    if rotated % 2:
        raise settings.error("qk_rope_head_dim", f"expected an even number of channels, found {rotated}")
    return Latent(
        rank=settings.count("kv_lora_rank", maximum=_MAX_HEAD),
        rotated=rotated,
        plain=settings.count("qk_nope_head_dim", maximum=_MAX_HEAD),
        value=settings.count("v_head_dim", maximum=_MAX_HEAD),
        query_rank=settings.count("q_lora_rank", default=0, minimum=0, maximum=_MAX_RANK),
    )


def latent_keys(page: Page, latent: Latent) -> None:
    """Writes the metadata of latent attention."""
    page.key("attention.head_count_kv", 1)
    page.key("attention.key_length", latent.rank + latent.rotated)
    page.key("attention.value_length", latent.rank)
    page.key("attention.key_length_mla", latent.plain + latent.rotated)
    page.key("attention.value_length_mla", latent.value)
    page.key("attention.kv_lora_rank", latent.rank)
    if latent.query_rank:
        page.key("attention.q_lora_rank", latent.query_rank)


def latent_attention(page: Page, layer: int, latent: Latent) -> None:
    place, source, heads = f"blk.{layer}", f"model.layers.{layer}.self_attn", page.heads
    queries = heads * (latent.plain + latent.rotated)
    if latent.query_rank:
        page.copy(f"{place}.attn_q_a", f"{source}.q_a_proj", latent.query_rank, page.width)
        page.copy(f"{place}.attn_q_a_norm", f"{source}.q_a_layernorm", latent.query_rank)
        page.copy(f"{place}.attn_q_b", f"{source}.q_b_proj", queries, latent.query_rank)
    else:
        page.copy(f"{place}.attn_q", f"{source}.q_proj", queries, page.width)
    page.copy(f"{place}.attn_kv_a_mqa", f"{source}.kv_a_proj_with_mqa", latent.rank + latent.rotated, page.width)
    page.copy(f"{place}.attn_kv_a_norm", f"{source}.kv_a_layernorm", latent.rank)
    both = latent.plain + latent.value
    by_head = in_groups(page.take(f"{source}.kv_b_proj.weight", heads * both, latent.rank), both)
    page.put(f"{place}.attn_k_b.weight", exchanged(part_of_each(by_head, 0, latent.plain)))
    page.put(f"{place}.attn_v_b.weight", part_of_each(by_head, latent.plain, both))
    page.copy(f"{place}.attn_output", f"{source}.o_proj", page.width, heads * latent.value)
