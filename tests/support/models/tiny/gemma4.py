"""Small random models of Gemma 4, whose windowed and other layers have different heads and widths."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import numpy as np

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny.shape import Tiny
from support.models.tiny_model import RandomTensor, matrix, norm

_WINDOWED = (True, True, False, True, True, False)
_HEADS, _HEAD, _WINDOW_HEAD = 4, 32, 16
_KV_HEADS = tuple(2 if windowed else 1 for windowed in _WINDOWED)
_WIDTHS = (96, 96, 64, 128, 96, 160)
_EXPERT_FFN = 48
_INPUT = 32  # channels of a per-layer input
_KEYS: dict[str, WritableValue] = {
    "attention.head_count_kv": np.array(_KV_HEADS, np.int32),
    "attention.key_length_swa": _WINDOW_HEAD,
    "attention.value_length_swa": _WINDOW_HEAD,
    "attention.shared_kv_layers": 0,
    "attention.sliding_window": 6,
    "attention.sliding_window_pattern": np.array(_WINDOWED),
    "embedding_length_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
    "rope.dimension_count_swa": _WINDOW_HEAD,
    "rope.freq_base": 1e6,
}

GEMMA4 = MappingProxyType(
    {
        "gemma4": Tiny(
            "gemma4",
            layers=len(_WINDOWED),
            head_dim=_HEAD,
            tied=True,
            factors=("rope_freqs",),
            keys={**_KEYS, "feed_forward_length": np.array(_WIDTHS, np.int32)},
        ),
        "gemma4-experts": Tiny(
            "gemma4",
            layers=len(_WINDOWED),
            head_dim=_HEAD,
            experts=8,
            tied=True,
            factors=("rope_freqs",),
            keys={**_KEYS, "expert_feed_forward_length": _EXPERT_FFN},
        ),
        "gemma4-inputs": Tiny(
            "gemma4",
            layers=len(_WINDOWED),
            head_dim=_HEAD,
            tied=True,
            factors=("rope_freqs",),
            keys={
                **_KEYS,
                "attention.shared_kv_layers": 3,
                "embedding_length_per_layer_input": _INPUT,
                "feed_forward_length": np.array(_WIDTHS, np.int32),
            },
        ),
    }
)


def inputs_of_gemma4(tiny: Tiny, vocabulary: int) -> Iterator[RandomTensor]:
    """Yields the tensors that per-layer inputs are computed from."""
    if _has_inputs(tiny):
        yield RandomTensor("per_layer_token_embd.weight", (vocabulary, tiny.layers * _INPUT), 0.3)
        yield matrix("per_layer_model_proj", tiny.layers * _INPUT, tiny.hidden, gain=8.0)
        yield norm("per_layer_proj_norm", _INPUT)


def _has_inputs(tiny: Tiny) -> bool:
    return tiny.keys.get("embedding_length_per_layer_input") == _INPUT


def _layer_input(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    yield matrix(f"{name}.inp_gate", _INPUT, tiny.hidden)
    yield matrix(f"{name}.proj", tiny.hidden, _INPUT)
    yield norm(f"{name}.post_norm", tiny.hidden)


def layer_of_gemma4(tiny: Tiny, layer: int) -> Iterator[RandomTensor]:
    name = f"blk.{layer}"
    if _has_inputs(tiny):
        yield from _layer_input(tiny, name)
    for part in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        yield norm(f"{name}.{part}", tiny.hidden)
    yield from _attention(tiny, layer)
    width = tiny.ffn if tiny.experts else _WIDTHS[layer]
    yield matrix(f"{name}.ffn_gate", width, tiny.hidden)
    yield matrix(f"{name}.ffn_up", width, tiny.hidden)
    yield matrix(f"{name}.ffn_down", tiny.hidden, width)
    yield RandomTensor(f"{name}.layer_output_scale.weight", (1,), 0.2, mean=0.8)
    if tiny.experts:
        yield from _experts(tiny, name)


def _attention(tiny: Tiny, layer: int) -> Iterator[RandomTensor]:
    """Yields attention weights; layers without a window have no weights for values."""
    name, windowed = f"blk.{layer}", _WINDOWED[layer]
    head = _WINDOW_HEAD if windowed else _HEAD
    yield matrix(f"{name}.attn_q", _HEADS * head, tiny.hidden)
    shares = _has_inputs(tiny) and layer >= 3
    for part in () if shares else ("attn_k", "attn_v") if windowed else ("attn_k",):
        yield matrix(f"{name}.{part}", _KV_HEADS[layer] * head, tiny.hidden)
    yield matrix(f"{name}.attn_output", tiny.hidden, _HEADS * head)
    for part in ("attn_q_norm",) if shares else ("attn_q_norm", "attn_k_norm"):
        yield RandomTensor(f"{name}.{part}.weight", (head,), 0.1, mean=0.6)


def _experts(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    for part in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
        yield norm(f"{name}.{part}", tiny.hidden)
    yield matrix(f"{name}.ffn_gate_inp", tiny.experts, tiny.hidden, gain=2.0)
    yield RandomTensor(f"{name}.ffn_gate_inp.scale", (tiny.hidden,), 2.0, mean=8.0)
    yield matrix(f"{name}.ffn_gate_up_exps", tiny.experts, 2 * _EXPERT_FFN, tiny.hidden)
    yield matrix(f"{name}.ffn_down_exps", tiny.experts, tiny.hidden, _EXPERT_FFN)
    yield RandomTensor(f"{name}.ffn_down_exps.scale", (tiny.experts,), 0.3, mean=1.0)
