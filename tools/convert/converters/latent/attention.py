"""Converts latent attention. GGUF splits the matrix that computes keys and values from the latent vector into
`attn_k_b` and `attn_v_b`, each with one matrix per head. The matrices of `attn_k_b` are transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.lazy import exchanged, in_groups, part_of_each

_MAX_HEAD: Final = 1 << 12
_MAX_RANK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Latent:
    """Numbers of channels in latent attention."""

    rank: int  # Channels of the latent vector for keys and values.
    rotated: int  # Channels of a key that RoPE rotates.
    plain: int  # Other channels of a key.
    value: int  # Channels of a value.
    query_rank: int  # Channels of the latent vector for queries, or 0 if queries have none.


def read_latent(model: ConvertedModel) -> Latent:
    """Reads the sizes of latent attention. Raises ModelFileError for attention that GGUF cannot express."""
    settings = model.settings
    if settings.flag("attention_bias"):
        raise settings.error("attention_bias", f"true is not supported by {model.architecture}")
    if not settings.flag("rope_interleave", default=True):
        raise settings.error("rope_interleave", "expected true (RoPE pairs neighbouring channels), found false")
    if model.kv_heads != model.heads:
        raise settings.error(
            "num_key_value_heads",
            f"expected {model.heads} (one per query head), found {model.kv_heads}: latent attention has no groups",
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


def latent_keys(model: ConvertedModel, latent: Latent) -> None:
    model.key("attention.head_count_kv", 1)
    model.key("attention.key_length", latent.rank + latent.rotated)
    model.key("attention.value_length", latent.rank)
    model.key("attention.key_length_mla", latent.plain + latent.rotated)
    model.key("attention.value_length_mla", latent.value)
    model.key("attention.kv_lora_rank", latent.rank)
    if latent.query_rank:
        model.key("attention.q_lora_rank", latent.query_rank)


def latent_attention(model: ConvertedModel, layer: int, latent: Latent) -> None:
    place, source, heads = f"blk.{layer}", f"model.layers.{layer}.self_attn", model.heads
    queries = heads * (latent.plain + latent.rotated)
    if latent.query_rank:
        model.copy(f"{place}.attn_q_a", f"{source}.q_a_proj", latent.query_rank, model.width)
        model.copy(f"{place}.attn_q_a_norm", f"{source}.q_a_layernorm", latent.query_rank)
        model.copy(f"{place}.attn_q_b", f"{source}.q_b_proj", queries, latent.query_rank)
    else:
        model.copy(f"{place}.attn_q", f"{source}.q_proj", queries, model.width)
    model.copy(f"{place}.attn_kv_a_mqa", f"{source}.kv_a_proj_with_mqa", latent.rank + latent.rotated, model.width)
    model.copy(f"{place}.attn_kv_a_norm", f"{source}.kv_a_layernorm", latent.rank)
    both = latent.plain + latent.value
    by_head = in_groups(model.take(f"{source}.kv_b_proj.weight", heads * both, latent.rank), both)
    model.put(f"{place}.attn_k_b.weight", exchanged(part_of_each(by_head, 0, latent.plain)))
    model.put(f"{place}.attn_v_b.weight", part_of_each(by_head, latent.plain, both))
    model.copy(f"{place}.attn_output", f"{source}.o_proj", model.width, heads * latent.value)
