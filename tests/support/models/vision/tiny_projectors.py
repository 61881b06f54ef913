"""Small projector files with random weights, by family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.gguf.writer import WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import RandomTensor, matrix, norm, source_of

WIDTH, HEADS, FFN, PATCH, TEXT_WIDTH = 64, 4, 96, 4, 96
EPSILON = 1e-5
MEAN, DEVIATION = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)


@dataclass(frozen=True, slots=True)
class TinyProjector:
    """A projector. `side`: patches per side of the file's image size; `tile`: lines and columns of the test's tile."""

    side: int
    tile: tuple[int, int]
    merge: int
    layers: int = 2
    ffn: int = FFN
    rms: bool = False
    gated: bool = False
    biases: bool = True
    fused: bool = False
    positions: bool = True
    scaled: bool = False  # layer scales of residuals
    post_norms: bool = False  # norms after attention and feed-forward, and of heads
    kept: tuple[int, ...] = ()  # deepstack layers
    keys: Mapping[str, WritableValue] = field(default_factory=dict)


_GELU: dict[str, WritableValue] = {"use_gelu": True}
_SILU: dict[str, WritableValue] = {"use_silu": True}
_SMALL_EPSILON: dict[str, WritableValue] = {"vision.attention.layer_norm_epsilon": 1e-6}

CLASSES = ("internvl", "llama4")
FRAMES = ("qwen2.5vl_merger", "qwen3vl_merger", "glm4v")
"""Families with one kernel for each of two frames."""
_WITHOUT_PATCH_BIAS = ("gemma4v", "llama4", "pixtral", "qwen2.5vl_merger")

PROJECTORS: Mapping[str, TinyProjector] = MappingProxyType(
    {
        "idefics3": TinyProjector(8, (8, 8), 2, keys=_GELU | {"vision.projector.scale_factor": 2}),
        "gemma3": TinyProjector(8, (8, 8), 4, keys=_GELU),
        "qwen2.5vl_merger": TinyProjector(
            8,
            (6, 10),
            2,
            layers=4,
            rms=True,
            gated=True,
            positions=False,
            keys=_SILU | _SMALL_EPSILON | {"vision.n_wa_pattern": 2, "vision.window_size": 4 * PATCH},
        ),
        "qwen3vl_merger": TinyProjector(
            4,
            (6, 10),
            2,
            layers=3,
            fused=True,
            kept=(0, 1),
            keys=_GELU
            | _SMALL_EPSILON
            | {"vision.spatial_merge_size": 2, "vision.is_deepstack_layers": np.array([True, True, False])},
        ),
        "gemma4v": TinyProjector(
            16,
            (6, 9),
            3,
            rms=True,
            gated=True,
            biases=False,
            post_norms=True,
            keys={"vision.image_max_pixels": 16 * 3 * PATCH**2, "vision.image_min_pixels": 9 * PATCH**2},
        ),
        "glm4v": TinyProjector(
            4,
            (6, 10),
            2,
            rms=True,
            gated=True,
            biases=False,
            fused=True,
            keys=_SILU | {"vision.spatial_merge_size": 2},
        ),
        "internvl": TinyProjector(8, (8, 8), 2, scaled=True, keys=_GELU | {"vision.projector.scale_factor": 2}),
        "kimivl": TinyProjector(4, (6, 10), 2, keys=_GELU),
        "lfm2": TinyProjector(
            8, (6, 10), 2, keys=_GELU | {"vision.image_min_pixels": 16, "vision.image_max_pixels": 100 * PATCH**2}
        ),
        "llama4": TinyProjector(8, (8, 8), 2, ffn=4 * WIDTH, keys=_GELU | {"vision.projector.scale_factor": 2}),
        "pixtral": TinyProjector(
            8,
            (6, 10),
            2,
            rms=True,
            gated=True,
            biases=False,
            positions=False,
            keys=_SILU | {"vision.spatial_merge_size": 2},
        ),
    }
)


def build_projector(
    path: Path,
    name: str,
    quant_type: QuantType = QuantType.F32,
    *,
    without: tuple[str, ...] = (),
    added: tuple[RandomTensor, ...] = (),
    keys: Mapping[str, WritableValue] | None = None,
) -> Path:
    """Writes a projector to `path` and returns `path`; the bytes are the same on every machine. `without` leaves out
    tensors and metadata by name, `added` adds tensors, and `keys` replace metadata (without `clip.`)."""
    tensors = [*_ends(name), *(tensor for layer in range(PROJECTORS[name].layers) for tensor in _layer(name, layer))]
    kept = [*(tensor for tensor in tensors if tensor.name not in without), *added]
    kinds = {tensor.name: QuantType.F32 if tensor.exact else quant_type for tensor in kept}
    sources = [source_of(tensor, kinds[tensor.name], seed=3) for tensor in kept]
    metadata = _metadata(name) | {f"clip.{key}": value for key, value in (keys or {}).items()}
    write_gguf(path, {key: value for key, value in metadata.items() if key not in without}, sources)
    return path


def _ends(name: str) -> Iterator[RandomTensor]:
    tiny = PROJECTORS[name]
    kernel = RandomTensor("v.patch_embd.weight", (WIDTH, 3, PATCH, PATCH), (3 * PATCH * PATCH) ** -0.5, exact=True)
    yield kernel
    if name in FRAMES:
        yield replace(kernel, name="v.patch_embd.weight.1")
    if name not in _WITHOUT_PATCH_BIAS:
        yield RandomTensor("v.patch_embd.bias", (WIDTH,), 0.2, exact=True)
    if name in CLASSES:
        yield RandomTensor("v.class_embd", (WIDTH,), 1.0, exact=True)
    if tiny.positions:
        shape = (2, tiny.side, WIDTH) if name == "gemma4v" else (tiny.side**2 + (name in CLASSES), WIDTH)
        yield RandomTensor("v.position_embd.weight", shape, 0.5, exact=True)
    yield from _projector(name)


def _projector(name: str) -> Iterator[RandomTensor]:
    tiny, merged = PROJECTORS[name], WIDTH * PROJECTORS[name].merge ** 2
    if name in ("pixtral", "llama4"):
        yield from _norm(name, "v.pre_ln")
    if name not in ("pixtral", "internvl", "gemma4v"):
        yield from _norm(name, "v.post_ln")
    match name:
        case "idefics3":
            yield matrix("mm.model.fc", TEXT_WIDTH, merged)
        case "gemma3":
            yield norm("mm.soft_emb_norm", WIDTH)
            yield RandomTensor("mm.input_projection.weight", (WIDTH, TEXT_WIDTH), WIDTH**-0.5, exact=True)
        case "gemma4v":
            yield RandomTensor("v.std_bias", (WIDTH,), 2.0, exact=True)
            yield RandomTensor("v.std_scale", (WIDTH,), 0.2, mean=0.5, exact=True)
            yield matrix("mm.input_projection", TEXT_WIDTH, WIDTH)
        case "glm4v":
            yield from _glm(merged)
        case "internvl":
            yield norm("mm.model.mlp.0", merged)
            yield RandomTensor("mm.model.mlp.0.bias", (merged,), 0.2, exact=True)
            yield from _perceptron(("mm.model.mlp.1", "mm.model.mlp.3"), merged, TEXT_WIDTH)
        case "kimivl" | "lfm2":
            yield norm("mm.input_norm", WIDTH if name == "kimivl" else merged)
            yield RandomTensor("mm.input_norm.bias", (WIDTH if name == "kimivl" else merged,), 0.2, exact=True)
            yield from _perceptron(("mm.1", "mm.2"), merged, merged)
        case "llama4":
            yield matrix("mm.model.mlp.1", WIDTH, merged)
            yield matrix("mm.model.mlp.2", WIDTH, WIDTH)
            yield matrix("mm.model.fc", TEXT_WIDTH, WIDTH)
        case "pixtral":
            yield norm("mm.input_norm", WIDTH)
            yield replace(matrix("mm.patch_merger", WIDTH, merged), exact=True)
            yield matrix("mm.1", TEXT_WIDTH, WIDTH)
            yield matrix("mm.2", TEXT_WIDTH, TEXT_WIDTH)
            yield RandomTensor("v.token_embd.img_break", (TEXT_WIDTH,), 1.0, exact=True)
        case _:
            yield from _perceptron(("mm.0", "mm.2"), merged, merged)
    for layer in tiny.kept:
        prefix = f"v.deepstack.{layer}"
        yield norm(f"{prefix}.norm", merged)
        yield RandomTensor(f"{prefix}.norm.bias", (merged,), 0.2, exact=True)
        yield from _perceptron((f"{prefix}.fc1", f"{prefix}.fc2"), merged, merged)


def _glm(merged: int) -> Iterator[RandomTensor]:
    yield norm("v.norm_embd", WIDTH)
    yield RandomTensor("mm.patch_merger.weight", (TEXT_WIDTH, WIDTH, 2, 2), merged**-0.5, exact=True)
    yield RandomTensor("mm.patch_merger.bias", (TEXT_WIDTH,), 0.2, exact=True)
    yield matrix("mm.model.fc", TEXT_WIDTH, TEXT_WIDTH)
    yield norm("mm.post_norm", TEXT_WIDTH)
    yield RandomTensor("mm.post_norm.bias", (TEXT_WIDTH,), 0.2, exact=True)
    for part in ("gate", "up"):
        yield matrix(f"mm.{part}", FFN, TEXT_WIDTH)
    yield matrix("mm.down", TEXT_WIDTH, FFN, gain=3.0)


def _perceptron(names: tuple[str, str], width: int, inner: int) -> Iterator[RandomTensor]:
    for name, shape in zip(names, ((inner, width), (TEXT_WIDTH, inner)), strict=True):
        yield matrix(name, *shape)
        yield RandomTensor(f"{name}.bias", shape[:1], 0.2, exact=True)


def _layer(name: str, layer: int) -> Iterator[RandomTensor]:
    tiny, prefix = PROJECTORS[name], f"v.blk.{layer}"
    yield from _norm(name, f"{prefix}.ln1")
    yield from _norm(name, f"{prefix}.ln2")
    if tiny.post_norms:
        yield norm(f"{prefix}.attn_q_norm", WIDTH // HEADS)
        yield norm(f"{prefix}.attn_k_norm", WIDTH // HEADS)
        yield norm(f"{prefix}.attn_post_norm", WIDTH)
        yield norm(f"{prefix}.ffn_post_norm", WIDTH)
    if tiny.scaled:
        yield RandomTensor(f"{prefix}.ls1.weight", (WIDTH,), 0.3, mean=0.7, exact=True)
        yield RandomTensor(f"{prefix}.ls2.weight", (WIDTH,), 0.3, mean=0.7, exact=True)
    attention = {"attn_qkv": 3 * WIDTH} if tiny.fused else dict.fromkeys(("attn_q", "attn_k", "attn_v"), WIDTH)
    products = {part: (width, WIDTH) for part, width in (attention | {"attn_out": WIDTH}).items()}
    products |= {"ffn_up": (tiny.ffn, WIDTH), "ffn_down": (WIDTH, tiny.ffn)}
    if tiny.gated:
        products["ffn_gate"] = (tiny.ffn, WIDTH)
    for part, shape in products.items():
        yield matrix(f"{prefix}.{part}", *shape, gain=1.5 if part in attention else 1.0)
        if tiny.biases:
            yield RandomTensor(f"{prefix}.{part}.bias", shape[:1], 0.2, exact=True)


def _norm(name: str, prefix: str) -> Iterator[RandomTensor]:
    yield norm(prefix, WIDTH)
    if not PROJECTORS[name].rms:
        yield RandomTensor(f"{prefix}.bias", (WIDTH,), 0.2, exact=True)


def _metadata(name: str) -> dict[str, WritableValue]:
    tiny = PROJECTORS[name]
    numbers: dict[str, WritableValue] = {
        "has_vision_encoder": True,
        "projector_type": name,
        "vision.image_size": tiny.side * PATCH,
        "vision.patch_size": PATCH,
        "vision.embedding_length": WIDTH,
        "vision.feed_forward_length": tiny.ffn,
        "vision.projection_dim": TEXT_WIDTH,
        "vision.block_count": tiny.layers,
        "vision.attention.head_count": HEADS,
        "vision.attention.layer_norm_epsilon": EPSILON,
        "vision.image_mean": np.array(MEAN, np.float32),
        "vision.image_std": np.array(DEVIATION, np.float32),
    }
    return {"general.architecture": "clip"} | {
        f"clip.{key}": value for key, value in (numbers | dict(tiny.keys)).items()
    }


def tile_of(name: str, seed: int = 5, patches: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Returns a tile of random colours, [height, width, 3], with `patches` lines and columns of patches."""
    lines, columns = patches or PROJECTORS[name].tile
    return np.random.default_rng(seed).integers(0, 256, (lines * PATCH, columns * PATCH, 3), np.uint8)
