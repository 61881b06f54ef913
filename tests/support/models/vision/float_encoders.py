"""Image encoders in float64, written from the families' definitions: patches line by line, masks for windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.reference.steps import gelu_erf, gelu_tanh, silu
from support.models.vision.tiny_projectors import CLASSES, DEVIATION, HEADS, MEAN, PATCH, PROJECTORS, WIDTH

Float64 = NDArray[np.float64]
Weights = Mapping[str, Float64]
_HEAD = WIDTH // HEADS
_QUARTER = _HEAD // 4


@dataclass(frozen=True, slots=True)
class _Encoder:
    """An encoder and the places (line, column) of its rows."""

    name: str
    weights: Weights
    places: NDArray[np.int64]

    @property
    def epsilon(self) -> float:
        return 1e-6 if self.name.startswith("qwen") else 1e-5

    def product(self, name: str, x: Float64) -> Float64:
        out: Float64 = x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)
        return out

    def norm(self, name: str, x: Float64, *, rms: bool | None = None) -> Float64:
        if f"{name}.weight" not in self.weights:
            return x
        rms = PROJECTORS[self.name].rms if rms is None else rms
        centred = x if rms else x - x.mean(axis=-1, keepdims=True)
        out: Float64 = _unit(centred, self.epsilon) * self.weights[f"{name}.weight"]
        return out + self.weights.get(f"{name}.bias", 0.0)

    def perceptron(self, first: str, second: str, x: Float64) -> Float64:
        return self.product(second, gelu_erf(self.product(first, x)))

    def block(self, layer: int, hidden: Float64) -> Float64:
        prefix = f"v.blk.{layer}"
        attended = self._attention(layer, self.norm(f"{prefix}.ln1", hidden))
        attended = self.norm(f"{prefix}.attn_post_norm", attended)
        hidden = hidden + attended * self.weights.get(f"{prefix}.ls1.weight", 1.0)
        inner = self.norm(f"{prefix}.ffn_post_norm", self._inner(prefix, self.norm(f"{prefix}.ln2", hidden)))
        return np.asarray(hidden + inner * self.weights.get(f"{prefix}.ls2.weight", 1.0))

    def _inner(self, prefix: str, x: Float64) -> Float64:
        up = self.product(f"{prefix}.ffn_up", x)
        if self.name == "gemma4v":
            up = gelu_tanh(self.product(f"{prefix}.ffn_gate", x)) * up
        elif PROJECTORS[self.name].gated:
            up = silu(self.product(f"{prefix}.ffn_gate", x)) * up
        else:
            up = gelu_erf(up) if self.name in CLASSES else gelu_tanh(up)
        return self.product(f"{prefix}.ffn_down", up)

    def _attention(self, layer: int, x: Float64) -> Float64:
        prefix = f"v.blk.{layer}"
        if f"{prefix}.attn_qkv.weight" in self.weights:
            q, k, v = np.split(self.product(f"{prefix}.attn_qkv", x), 3, axis=1)
        else:
            q, k, v = (self.product(f"{prefix}.attn_{part}", x) for part in "qkv")
        q, k, v = (part.reshape(-1, HEADS, _HEAD) for part in (q, k, v))
        q, k = self.norm(f"{prefix}.attn_q_norm", q), self.norm(f"{prefix}.attn_k_norm", k)
        q, k = self._turned(q), self._turned(k)
        scale = 1 / math.sqrt(_HEAD)
        if self.name == "gemma4v":
            v, scale = _unit(v, self.epsilon), 1.0
        scores = np.where(self._mask(layer), np.einsum("qhc,khc->hqk", q, k) * scale, -np.inf)
        powers = np.exp(scores - scores.max(axis=2, keepdims=True))
        attended = np.einsum("hqk,khc->qhc", powers / powers.sum(axis=2, keepdims=True), v)
        return self.product(f"{prefix}.attn_out", attended.reshape(-1, WIDTH))

    def _mask(self, layer: int) -> NDArray[np.bool_]:
        if self.name != "qwen2.5vl_merger" or layer % 2 == 1:
            return np.ones((len(self.places), len(self.places)), bool)
        window = self.places // 4  # windows of 4 x 4 patches
        return np.asarray((window[:, None] == window[None]).all(axis=2))

    def _turned(self, x: Float64) -> Float64:
        lines, columns = self.places[:, :1], self.places[:, 1:]
        steps = 10000.0 ** (-np.arange(_QUARTER) / _QUARTER)
        match self.name:
            case "qwen2.5vl_merger" | "qwen3vl_merger" | "glm4v":
                return _turned_halves(x, np.concatenate((lines * steps, columns * steps), axis=1))
            case "gemma4v":
                steps = 100.0 ** (-np.arange(_QUARTER) / _QUARTER)
                first, second = np.split(x, 2, axis=2)
                return np.concatenate(
                    (_turned_halves(first, columns * steps), _turned_halves(second, lines * steps)), 2
                )
            case "pixtral":
                steps = 10000.0 ** (-np.arange(2 * _QUARTER) / (2 * _QUARTER))
                return _turned_pairs(x, np.concatenate((lines * steps[0::2], columns * steps[1::2]), axis=1))
            case "llama4":
                first = np.where(lines < 0, 0, 1 + columns) * steps
                return _turned_pairs(x, np.concatenate((first, np.where(lines < 0, 0, 1 + lines) * steps), axis=1))
            case "kimivl":
                angles = np.stack((columns * steps, lines * steps), axis=2)
                return _turned_pairs(x, angles.reshape(len(x), -1))
        return x


def encoder_rows(name: str, weights: Weights, tile: NDArray[np.uint8]) -> Float64:
    """Returns the text model's rows [rows, channels], line by line."""
    tiny = PROJECTORS[name]
    lines, columns = tile.shape[0] // PATCH, tile.shape[1] // PATCH
    places = [(y, x) for y in range(lines) for x in range(columns)]
    if name in CLASSES:
        places.append((-1, -1))
    encoder = _Encoder(name, weights, np.array(places))
    hidden = encoder.norm("v.pre_ln", _embedded(encoder, tile))
    kept = []
    for layer in range(tiny.layers):
        hidden = encoder.block(layer, hidden)
        if layer in tiny.kept:
            kept.append((layer, hidden))
    hidden = encoder.norm("v.post_ln", hidden)[: lines * columns]
    rows = [_projected(encoder, hidden.reshape(lines, columns, WIDTH))]
    for layer, each in kept:
        merged = encoder.norm(f"v.deepstack.{layer}.norm", _merged(each.reshape(lines, columns, WIDTH), tiny.merge))
        rows.append(encoder.perceptron(f"v.deepstack.{layer}.fc1", f"v.deepstack.{layer}.fc2", merged))
    return np.concatenate(rows, axis=1)


def _projected(encoder: _Encoder, grid: Float64) -> Float64:
    merge, weights = PROJECTORS[encoder.name].merge, encoder.weights
    groups = _merged(grid, merge)
    match encoder.name:
        case "idefics3":
            return encoder.product("mm.model.fc", groups)
        case "gemma3":
            pooled = groups.reshape(-1, merge**2, WIDTH).mean(axis=1)
            return encoder.norm("mm.soft_emb_norm", pooled, rms=True) @ weights["mm.input_projection.weight"]
        case "gemma4v":
            pooled = groups.reshape(-1, merge**2, WIDTH).mean(axis=1) * math.sqrt(WIDTH)
            pooled = (pooled - weights["v.std_bias"]) * weights["v.std_scale"]
            return encoder.product("mm.input_projection", _unit(pooled, encoder.epsilon))
        case "glm4v":
            kernel = weights["mm.patch_merger.weight"]
            parts = groups.reshape(-1, merge, merge, WIDTH)
            joined = np.einsum("gyxc,ocyx->go", parts, kernel) + weights["mm.patch_merger.bias"]
            x = gelu_erf(encoder.norm("mm.post_norm", encoder.product("mm.model.fc", joined), rms=False))
            return encoder.product("mm.down", silu(encoder.product("mm.gate", x)) * encoder.product("mm.up", x))
        case "internvl":
            return encoder.perceptron("mm.model.mlp.1", "mm.model.mlp.3", encoder.norm("mm.model.mlp.0", groups))
        case "kimivl":
            return encoder.perceptron("mm.1", "mm.2", _merged(encoder.norm("mm.input_norm", grid), merge))
        case "lfm2":
            return encoder.perceptron("mm.1", "mm.2", encoder.norm("mm.input_norm", groups))
        case "llama4":
            adapted = gelu_erf(encoder.perceptron("mm.model.mlp.1", "mm.model.mlp.2", groups))
            return encoder.product("mm.model.fc", adapted)
        case "pixtral":
            grouped = _merged(encoder.norm("mm.input_norm", grid), merge).reshape(-1, merge**2, WIDTH)
            joined = encoder.product("mm.patch_merger", grouped.swapaxes(1, 2).reshape(len(grouped), -1))
            return encoder.perceptron("mm.1", "mm.2", joined)
    return encoder.perceptron("mm.0", "mm.2", groups)


def _embedded(encoder: _Encoder, tile: NDArray[np.uint8]) -> Float64:
    name, weights = encoder.name, encoder.weights
    lines, columns = tile.shape[0] // PATCH, tile.shape[1] // PATCH
    colours = (tile / 255 - np.array(MEAN)) / np.array(DEVIATION)
    if name == "gemma4v":
        colours = 2 * colours - 1
    kernel = weights["v.patch_embd.weight"] + weights.get("v.patch_embd.weight.1", 0.0)
    cut = colours.reshape(lines, PATCH, columns, PATCH, 3)
    out = np.einsum("ocyx,lymxc->lmo", kernel, cut).reshape(-1, WIDTH)
    out = encoder.norm("v.norm_embd", out + weights.get("v.patch_embd.bias", 0.0))
    if name in CLASSES:
        order = np.roll(np.arange(len(out) + 1), -1) if name == "internvl" else np.arange(len(out) + 1)
        return np.concatenate((out, weights["v.class_embd"][None])) + weights["v.position_embd.weight"][order]
    if name == "gemma4v":
        across, down = weights["v.position_embd.weight"]
        return np.asarray(out + across[encoder.places[:, 1]] + down[encoder.places[:, 0]])
    if "v.position_embd.weight" in weights:
        side = PROJECTORS[name].side
        table = weights["v.position_embd.weight"].reshape(side, side, WIDTH)
        down, across = _shares(name, lines, side), _shares(name, columns, side)
        out = out + np.einsum("li,mj,ijc->lmc", down, across, table).reshape(-1, WIDTH)
    return np.asarray(out)


def _shares(name: str, size: int, side: int) -> Float64:
    """Returns the weights [size, side] that interpolate the table of learned positions for a tile."""
    places, table = np.arange(size)[:, None], np.arange(side)
    middle = (places + 0.5) * side / size - 0.5
    match name:
        case "glm4v" | "kimivl":
            reach = np.arange(-4, side + 4)
            shares = _cubic(np.abs(middle - reach))
            return np.stack([shares[:, np.clip(reach, 0, side - 1) == i].sum(axis=1) for i in table], axis=1)
        case "lfm2":
            shares = np.maximum(0.0, 1 - np.abs(middle - table) / max(side / size, 1.0))
            return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    return np.asarray(np.maximum(0.0, 1 - np.abs(places * (side - 1) / (size - 1) - table)))


def _cubic(x: Float64) -> Float64:
    a = -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _unit(x: Float64, epsilon: float) -> Float64:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon))


def _turned_pairs(x: Float64, angles: Float64) -> Float64:
    """Rotates channels 2 i and 2 i + 1 of each head by angle i of the row."""
    pairs = (x[:, :, 0::2] + 1j * x[:, :, 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack((pairs.real, pairs.imag), axis=3).reshape(x.shape)


def _turned_halves(x: Float64, angles: Float64) -> Float64:
    first, second = np.split(x, 2, axis=2)
    pairs = (first + 1j * second) * np.exp(1j * angles)[:, None]
    return np.concatenate((pairs.real, pairs.imag), axis=2)


def _merged(grid: Float64, merge: int) -> Float64:
    """Joins the rows of merge x merge places, line by line: [groups, merge * merge * WIDTH]."""
    lines, columns, _ = grid.shape
    groups = [
        grid[y : y + merge, x : x + merge].reshape(-1) for y in range(0, lines, merge) for x in range(0, columns, merge)
    ]
    return np.stack(groups)
