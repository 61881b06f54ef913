"""Writes the metadata that all architectures have, and the tensors of architectures derived from LLaMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llamaclust.model.checkpoints.modules import PAIRED, QKV
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.lazy import stacked
from llamaclust.tools.convert.page import Page, neighbours
from llamaclust.tools.convert.settings import MAX_CONTEXT

SILU: Final = ("silu", "swish")
GELU: Final = ("gelu_pytorch_tanh", "gelu_new", "gelu")
"""Names of GELU in configurations. The tanh and erf forms of GELU count as equal, as in llama.cpp."""


def activation(page: Page, names: Sequence[str], *keys: str) -> None:
    stated = page.settings.text(*keys, default=names[0])
    if stated not in names:
        raise page.settings.error(keys[0], f"{shown(stated)}: {page.architecture} computes {names[0]}")


def usual_keys(page: Page, feed_forward: int) -> None:
    context = ("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "seq_length")
    page.key("block_count", page.layers)
    page.key("context_length", page.settings.count(*context, maximum=MAX_CONTEXT))
    page.key("embedding_length", page.width)
    page.key("feed_forward_length", feed_forward)
    page.key("attention.head_count", page.heads)
    page.key("attention.head_count_kv", page.kv_heads)
    if page.settings.has("head_dim"):
        page.key("attention.key_length", page.head_width)
        page.key("attention.value_length", page.head_width)


def rms_epsilon(page: Page, *names: str, default: float | None = None) -> None:
    epsilon = page.settings.real(*(names or ("rms_norm_eps",)), default=default, minimum=1e-12, maximum=0.1)
    page.key("attention.layer_norm_rms_epsilon", epsilon)


def norm_epsilon(page: Page, *names: str) -> None:
    page.key("attention.layer_norm_epsilon", page.settings.real(*names, minimum=1e-12, maximum=0.1))


def ends(page: Page) -> None:
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    page.copy("output_norm", "model.norm", page.width)
    page.output()


def norms(page: Page, layer: int) -> None:
    page.copy(f"blk.{layer}.attn_norm", f"model.layers.{layer}.input_layernorm", page.width)
    page.copy(f"blk.{layer}.ffn_norm", f"model.layers.{layer}.post_attention_layernorm", page.width)


def attention(page: Page, layer: int, *, bias: bool | None = None) -> None:
    """Copies the attention matrices. Permutes Q and K for RoPE if the architecture is in `PAIRED`."""
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    for (part, module), heads in zip(QKV.items(), (page.heads, page.kv_heads, page.kv_heads), strict=True):
        rows = heads * page.head_width
        page.copy(f"{place}.attn_{part}", f"{source}.{module}", rows, page.width, bias=bias)
        if page.architecture in PAIRED and part != "v":
            for suffix in ("weight", "bias"):
                name = f"{place}.attn_{part}.{suffix}"
                if name in page.tensors:
                    page.tensors[name] = neighbours(page.tensors[name], heads)
    page.copy(f"{place}.attn_output", f"{source}.self_attn.o_proj", page.width, page.heads * page.head_width, bias=None)


def feed_forward(page: Page, layer: int, width: int, *, source: str = "mlp", suffix: str = "") -> None:
    prefix = f"model.layers.{layer}.{source}"
    page.copy(f"blk.{layer}.ffn_gate{suffix}", f"{prefix}.gate_proj", width, page.width, bias=None)
    page.copy(f"blk.{layer}.ffn_up{suffix}", f"{prefix}.up_proj", width, page.width, bias=None)
    page.copy(f"blk.{layer}.ffn_down{suffix}", f"{prefix}.down_proj", page.width, width, bias=None)


def experts(page: Page, place: str, count: int, width: int, names: tuple[str, str, str], prefix: str) -> None:
    shapes = ((width, page.width), (width, page.width), (page.width, width))
    for part, name, shape in zip(("gate", "up", "down"), names, shapes, strict=True):
        found = [page.take(f"{prefix}.{number}.{name}.weight", *shape) for number in range(count)]
        page.put(f"{place}.ffn_{part}_exps.weight", stacked(found))


def feed_forward_width(page: Page) -> int:
    activation(page, SILU, "hidden_act")
    return page.settings.count("intermediate_size", "n_inner")


def windowed_layers(page: Page, period: int) -> list[bool]:
    """Returns, for each layer, True if its attention has a window. By default, every `period`th layer has no window."""
    listed = page.settings.values.get("layer_types")
    if not isinstance(listed, list):
        return [(layer + 1) % period != 0 for layer in range(page.layers)]
    if len(listed) != page.layers or not all(kind in ("sliding_attention", "full_attention") for kind in listed):
        raise page.settings.error(
            "layer_types", f"expected {page.layers} kinds of attention, found {len(listed)} entries"
        )
    return [kind == "sliding_attention" for kind in listed]


def layer_kinds(page: Page, name: str, kinds: Mapping[str, str]) -> list[str]:
    listed = page.settings.values.get(name)
    if not isinstance(listed, list) or not all(isinstance(kind, str) and kind in kinds for kind in listed):
        raise page.settings.error(name, f"expected a list of {', '.join(kinds)}")
    if len(listed) != page.layers:
        raise page.settings.error(name, f"expected {page.layers} entries, one for each layer, found {len(listed)}")
    return [kinds[kind] for kind in listed]


def numbered_layers(page: Page, name: str, listed: Sequence[Any], first: int = 0) -> set[int]:
    """Returns the layer numbers in `listed`, counted from `first`. Raises ModelFileError for numbers out of range."""
    if len(listed) > page.layers:
        raise page.settings.error(name, f"expected {page.layers} entries, one for each layer, found {len(listed)}")
    last = first + page.layers - 1
    if not all(type(number) is int and first <= number <= last for number in listed):
        raise page.settings.error(name, f"expected numbers of {first} to {last}")
    return set(listed)


def refuse(page: Page, *names: str) -> None:
    """Raises ModelFileError if one of the named settings is true, because the GGUF architecture cannot express it."""
    for name in names:
        if page.settings.flag(name):
            raise page.settings.error(name, f"true is not supported by {page.architecture}")
