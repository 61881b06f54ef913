"""Writes the metadata that all architectures have, and the tensors of architectures derived from LLaMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llamaclust.model.checkpoints.modules import PAIRED, QKV
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.converted_model import ConvertedModel, neighbours
from llamaclust.tools.convert.lazy import stacked
from llamaclust.tools.convert.settings import MAX_CONTEXT

SILU: Final = ("silu", "swish")
GELU: Final = ("gelu_pytorch_tanh", "gelu_new", "gelu")
"""Names of GELU in configurations. The tanh and erf forms of GELU count as equal, as in llama.cpp."""


def activation(model: ConvertedModel, names: Sequence[str], *keys: str) -> None:
    stated = model.settings.text(*keys, default=names[0])
    if stated not in names:
        raise model.settings.error(keys[0], f"{shown(stated)} is not supported; expected {names[0]}")


def usual_keys(model: ConvertedModel, feed_forward: int) -> None:
    context = ("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "seq_length")
    model.key("block_count", model.layers)
    model.key("context_length", model.settings.count(*context, maximum=MAX_CONTEXT))
    model.key("embedding_length", model.width)
    model.key("feed_forward_length", feed_forward)
    model.key("attention.head_count", model.heads)
    model.key("attention.head_count_kv", model.kv_heads)
    if model.settings.has("head_dim"):
        model.key("attention.key_length", model.head_width)
        model.key("attention.value_length", model.head_width)


def rms_epsilon(model: ConvertedModel, *names: str, default: float | None = None) -> None:
    epsilon = model.settings.real(*(names or ("rms_norm_eps",)), default=default, minimum=1e-12, maximum=0.1)
    model.key("attention.layer_norm_rms_epsilon", epsilon)


def norm_epsilon(model: ConvertedModel, *names: str) -> None:
    model.key("attention.layer_norm_epsilon", model.settings.real(*names, minimum=1e-12, maximum=0.1))


def ends(model: ConvertedModel) -> None:
    model.copy("token_embd", "model.embed_tokens", model.words, model.width)
    model.copy("output_norm", "model.norm", model.width)
    model.output()


def norms(model: ConvertedModel, layer: int) -> None:
    model.copy(f"blk.{layer}.attn_norm", f"model.layers.{layer}.input_layernorm", model.width)
    model.copy(f"blk.{layer}.ffn_norm", f"model.layers.{layer}.post_attention_layernorm", model.width)


def attention(model: ConvertedModel, layer: int, *, bias: bool | None = None) -> None:
    """Copies the attention matrices. Interleaves the halves of each head in Q and K for `PAIRED` architectures."""
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    for (part, module), heads in zip(QKV.items(), (model.heads, model.kv_heads, model.kv_heads), strict=True):
        rows = heads * model.head_width
        model.copy(f"{place}.attn_{part}", f"{source}.{module}", rows, model.width, bias=bias)
        if model.architecture in PAIRED and part != "v":
            for suffix in ("weight", "bias"):
                name = f"{place}.attn_{part}.{suffix}"
                if name in model.tensors:
                    model.tensors[name] = neighbours(model.tensors[name], heads)
    model.copy(
        f"{place}.attn_output", f"{source}.self_attn.o_proj", model.width, model.heads * model.head_width, bias=None
    )


def feed_forward(model: ConvertedModel, layer: int, width: int, *, source: str = "mlp", suffix: str = "") -> None:
    prefix = f"model.layers.{layer}.{source}"
    model.copy(f"blk.{layer}.ffn_gate{suffix}", f"{prefix}.gate_proj", width, model.width, bias=None)
    model.copy(f"blk.{layer}.ffn_up{suffix}", f"{prefix}.up_proj", width, model.width, bias=None)
    model.copy(f"blk.{layer}.ffn_down{suffix}", f"{prefix}.down_proj", model.width, width, bias=None)


def experts(
    model: ConvertedModel, place: str, count: int, width: int, names: tuple[str, str, str], prefix: str
) -> None:
    shapes = ((width, model.width), (width, model.width), (model.width, width))
    for part, name, shape in zip(("gate", "up", "down"), names, shapes, strict=True):
        found = [model.take(f"{prefix}.{number}.{name}.weight", *shape) for number in range(count)]
        model.put(f"{place}.ffn_{part}_exps.weight", stacked(found))


def feed_forward_width(model: ConvertedModel) -> int:
    activation(model, SILU, "hidden_act")
    return model.settings.count("intermediate_size", "n_inner")


def windowed_layers(model: ConvertedModel, period: int) -> list[bool]:
    """Returns, for each layer, True if it has a sliding window. By default, every `period`th layer has none."""
    listed = model.settings.values.get("layer_types")
    if not isinstance(listed, list):
        return [(layer + 1) % period != 0 for layer in range(model.layers)]
    if len(listed) != model.layers or not all(kind in ("sliding_attention", "full_attention") for kind in listed):
        raise model.settings.error(
            "layer_types",
            f"expected {model.layers} entries, each sliding_attention or full_attention,"
            f" found {len(listed)}: {model.settings.shown('layer_types')}",
        )
    return [kind == "sliding_attention" for kind in listed]


def layer_kinds(model: ConvertedModel, name: str, kinds: Mapping[str, str]) -> list[str]:
    listed = model.settings.values.get(name)
    if not isinstance(listed, list) or not all(isinstance(kind, str) and kind in kinds for kind in listed):
        raise model.settings.error(name, f"expected a list of {', '.join(kinds)}")
    if len(listed) != model.layers:
        raise model.settings.error(name, f"expected {model.layers} entries, one for each layer, found {len(listed)}")
    return [kinds[kind] for kind in listed]


def numbered_layers(model: ConvertedModel, name: str, listed: Sequence[Any], first: int = 0) -> set[int]:
    """Returns `listed` as a set. Raises ModelFileError for a layer number below `first` or above the last layer."""
    if len(listed) > model.layers:
        raise model.settings.error(name, f"expected at most {model.layers} layer numbers, found {len(listed)}")
    last = first + model.layers - 1
    if not all(type(number) is int and first <= number <= last for number in listed):
        raise model.settings.error(name, f"expected layer numbers from {first} to {last}")
    return set(listed)


def refuse(model: ConvertedModel, *names: str) -> None:
    """Raises ModelFileError if one of the named settings is true, because the GGUF architecture cannot express it."""
    for name in names:
        if model.settings.flag(name):
            raise model.settings.error(name, f"true is not supported by {model.architecture}")
