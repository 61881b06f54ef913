"""A small random Gemma 3n. Some of its numbers are constants in llama.cpp: copies, rank, channels of inputs, layers
with sparse activations, and the 20 layers with their own keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType

import numpy as np

from support.models.tiny.shape import Tiny
from support.models.tiny_model import RandomTensor, matrix, norm

_COPIES, _RANK, _INPUT = 4, 64, 256
_LAYERS, _OWN_KV, _SPARSE = 22, 20, 10
_FFN = 256
_FULL = (4, 9, 14, 19, 21)
_SCALE = 1.6448533535003662 * math.sqrt(_FFN / (_FFN - 1))
"""The original's factor, corrected for llama.cpp, which divides the variance by one less than the channels."""

GEMMA3N = MappingProxyType(
    {
        "gemma3n": Tiny(
            "gemma3n",
            layers=_LAYERS,
            ffn=_FFN,
            tied=True,
            keys={
                "activation_sparsity_scale": np.array([_SCALE] * _SPARSE + [-math.inf] * 12, np.float32),
                "altup.active_idx": 0,
                "altup.num_inputs": _COPIES,
                "attention.shared_kv_layers": _LAYERS - _OWN_KV,
                "attention.sliding_window": 6,
                "attention.sliding_window_pattern": np.array([layer not in _FULL for layer in range(_LAYERS)]),
                "embedding_length_per_layer_input": _INPUT,
                "final_logit_softcapping": 30.0,
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 3000.0,
            },
        )
    }
)


def ends_of_gemma3n(tiny: Tiny, vocabulary: int) -> Iterator[RandomTensor]:
    """Yields tensors outside of layers, except the embedding and the output norm."""
    if tiny.architecture != "gemma3n":
        return
    for name in ("altup_proj", "altup_unembd_proj"):
        yield matrix(name, _COPIES - 1, tiny.hidden, tiny.hidden)
    yield RandomTensor("per_layer_token_embd.weight", (vocabulary, tiny.layers * _INPUT), 0.1)
    yield matrix("per_layer_model_proj", tiny.layers * _INPUT, tiny.hidden, gain=8.0)
    yield norm("per_layer_proj_norm", _INPUT)


def layer_of_gemma3n(tiny: Tiny, layer: int) -> Iterator[RandomTensor]:
    name, hidden = f"blk.{layer}", tiny.hidden
    for part in ("attn_norm", "ffn_norm", "altup_router_norm"):
        yield norm(f"{name}.{part}", hidden)
    for part in ("post_attention_norm", "post_ffw_norm", "laurel_post_norm", "post_norm"):
        yield RandomTensor(f"{name}.{part}.weight", (hidden,), 0.1, mean=0.4)
    yield matrix(f"{name}.altup_router", _COPIES, hidden, gain=16.0)
    yield matrix(f"{name}.altup_predict_coef", _COPIES**2, _COPIES, gain=0.2)
    yield matrix(f"{name}.altup_correct_coef", _COPIES, _COPIES, gain=0.6)
    yield RandomTensor(f"{name}.altup_correct_scale.weight", (hidden,), 0.4, mean=1.0)
    yield matrix(f"{name}.laurel_l", _RANK, hidden)
    yield matrix(f"{name}.laurel_r", hidden, _RANK)
    yield matrix(f"{name}.inp_gate", _INPUT, hidden)
    yield matrix(f"{name}.proj", hidden, _INPUT)
    yield from _attention(tiny, name)
    yield matrix(f"{name}.ffn_gate", tiny.ffn, hidden)
    yield matrix(f"{name}.ffn_up", tiny.ffn, hidden)
    yield matrix(f"{name}.ffn_down", hidden, tiny.ffn)


def _attention(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    """Yields attention weights, also of layers that read the keys and values of others: llama.cpp requires them."""
    query, kv = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    yield matrix(f"{name}.attn_q", query, tiny.hidden)
    yield matrix(f"{name}.attn_k", kv, tiny.hidden)
    yield matrix(f"{name}.attn_v", kv, tiny.hidden)
    yield matrix(f"{name}.attn_output", tiny.hidden, query)
    for part in ("attn_q_norm", "attn_k_norm"):
        yield RandomTensor(f"{name}.{part}.weight", (tiny.head_dim,), 0.1, mean=0.8)
