"""Hidden states of the small encoders, computed independently in float64, all tokens of a prompt at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from support.models.tiny_encoders import HEADS, HIDDEN, LAYERS, WINDOW

Float64 = NDArray[np.float64]
Weights = Mapping[str, Float64]
_SLOPES = np.array([2.0 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)])
_ROTATIONS = {
    "nomic-bert": 1000.0,
    "nomic-bert-moe": 1000.0,
    "jina-bert-v3": 500.0,
    "modern-bert": 1000.0,
    "gemma-embedding": 1000.0,
}
_LOCAL_ROTATIONS = {"modern-bert": 50.0, "gemma-embedding": 10000.0}
_HALF = WINDOW // 2


def hidden_states(name: str, w: Weights, tokens: list[int]) -> Float64:
    """Returns the embedding of each token [tokens, channels] as the papers define it."""
    if name == "modern-bert":
        return _modern_bert(w, tokens)
    if name == "gemma-embedding":
        return _gemma(w, tokens)
    x = w["token_embd.weight"][tokens] + w["token_types.weight"][0]
    if name == "bert":
        x = x + w["position_embd.weight"][: len(tokens)]
    x = _norm(w, "token_embd_norm", x)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        x = _norm(w, f"{prefix}.attn_output_norm", x + _attention(name, w, prefix, x))
        x = _norm(w, f"{prefix}.layer_output_norm", x + _inner(name, w, prefix, x))
    return x


def _modern_bert(w: Weights, tokens: list[int]) -> Float64:
    x = _norm(w, "token_embd_norm", w["token_embd.weight"][tokens])
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        normed = _norm(w, f"{prefix}.attn_norm", x) if layer > 0 else x
        x = x + _attention("modern-bert", w, prefix, normed, is_local=layer % 3 != 0)
        gate, up = np.split(_product(w, f"{prefix}.ffn_up", _norm(w, f"{prefix}.ffn_norm", x)), 2, axis=1)
        x = x + _product(w, f"{prefix}.ffn_down", _gelu(gate) * up)
    return _norm(w, "output_norm", x)


def _gemma(w: Weights, tokens: list[int]) -> Float64:
    x = w["token_embd.weight"][tokens] * HIDDEN**0.5
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        normed = _rms_norm(w, f"{prefix}.attn_norm", x)
        attended = _attention("gemma-embedding", w, prefix, normed, is_local=layer % 3 < 2)
        x = x + _rms_norm(w, f"{prefix}.post_attention_norm", attended)
        normed = _rms_norm(w, f"{prefix}.ffn_norm", x)
        gate, up = (_product(w, f"{prefix}.ffn_{part}", normed) for part in ("gate", "up"))
        activated = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        x = x + _rms_norm(w, f"{prefix}.post_ffw_norm", _product(w, f"{prefix}.ffn_down", activated * up))
    return _product(w, "dense_3", _product(w, "dense_2", _rms_norm(w, "output_norm", x)))


def _attention(name: str, w: Weights, prefix: str, x: Float64, *, is_local: bool = False) -> Float64:
    q, k, v = _heads(w, prefix, x)
    if f"{prefix}.attn_q_norm.weight" in w:
        q, k = _rms_norm(w, f"{prefix}.attn_q_norm", q), _rms_norm(w, f"{prefix}.attn_k_norm", k)
    if name in _ROTATIONS:
        base = (_LOCAL_ROTATIONS if is_local else _ROTATIONS)[name]
        q, k = _rotated(q, base), _rotated(k, base)
    k, v = (part.repeat(HEADS // len(part), axis=0) for part in (k, v))
    scores = q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5
    places = np.arange(len(x))
    distance = np.abs(places[:, None] - places)
    if name == "jina-bert-v2":
        scores = scores - _SLOPES[:, None, None] * distance
    if is_local:
        scores = np.where(distance > _HALF, -np.inf, scores)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return _product(w, f"{prefix}.attn_output", (shares @ v).transpose(1, 0, 2).reshape(len(x), -1))


def _heads(w: Weights, prefix: str, x: Float64) -> list[Float64]:
    """Returns queries, keys and values, [heads, tokens, channels]."""
    if f"{prefix}.attn_qkv.weight" in w:
        parts = np.split(_product(w, f"{prefix}.attn_qkv", x), 3, axis=1)
    else:
        parts = [_product(w, f"{prefix}.attn_{part}", x) for part in "qkv"]
    width = parts[0].shape[1] // HEADS
    return [part.reshape(len(x), -1, width).transpose(1, 0, 2) for part in parts]


def _rotated(x: Float64, base: float) -> Float64:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _inner(name: str, w: Weights, prefix: str, x: Float64) -> Float64:
    if f"{prefix}.ffn_up_exps.weight" in w:
        return _experts(w, prefix, x)
    up = _product(w, f"{prefix}.ffn_up", x)
    if f"{prefix}.ffn_gate.weight" not in w:
        return _product(w, f"{prefix}.ffn_down", _gelu(up))
    gate = _product(w, f"{prefix}.ffn_gate", x)
    activated = gate / (1 + np.exp(-gate)) if name == "nomic-bert" else _gelu(gate)
    return _product(w, f"{prefix}.ffn_down", activated * up)


def _experts(w: Weights, prefix: str, x: Float64) -> Float64:
    """Sums the two most probable experts, weighted by their probabilities among all experts."""
    shares = np.exp(_product(w, f"{prefix}.ffn_gate_inp", x))
    shares /= shares.sum(axis=1, keepdims=True)
    out = np.zeros_like(x)
    for row, experts in enumerate(np.argsort(-shares, axis=1)[:, :2]):
        for expert in experts:
            up, down = (w[f"{prefix}.ffn_{part}_exps.weight"][expert] for part in ("up", "down"))
            out[row] += shares[row, expert] * (down @ _gelu(up @ x[row]))
    return out


def _gelu(x: Float64) -> Float64:
    return np.asarray(x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def _product(w: Weights, name: str, x: Float64) -> Float64:
    return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0))


def _norm(w: Weights, name: str, x: Float64) -> Float64:
    centred: Float64 = x - x.mean(axis=1, keepdims=True)
    scale: Float64 = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-12)
    return np.asarray(centred / scale * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0))


def _rms_norm(w: Weights, name: str, x: Float64) -> Float64:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * w[f"{name}.weight"])
