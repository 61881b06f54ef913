"""Blocks from which image encoders are built. The builder checks that the file has each weight that a block uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamaclust.model import program as steps
from llamaclust.model.architectures.tensors import CheckedTensors
from llamaclust.model.architectures.vision.attention import Rotation, VisionAttention
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Buffer, Program
from llamaclust.model.steps.options import ActivationFunction

PATCH_WEIGHT, SECOND_PATCH_WEIGHT, PATCH_BIAS = "v.patch_embd.weight", "v.patch_embd.weight.1", "v.patch_embd.bias"
POSITIONS = "v.position_embd.weight"
CHANNELS = 3
_PLAIN = VisionAttention()


@dataclass(frozen=True, slots=True)
class VisionHyperparameters:
    """Widths and counts of an image encoder. `patch_size` is in pixels. A square of `merge` x `merge` patches becomes
    one row for the text model. In the input, a patch's pixels are followed by `added_width` channels, which are added
    to its embedding."""

    block_count: int
    embedding_length: int
    head_count: int
    epsilon: float
    activation: ActivationFunction
    patch_size: int
    merge: int
    added_width: int

    @property
    def head_dim(self) -> int:
        return self.embedding_length // self.head_count

    @property
    def merged(self) -> int:
        return self.merge * self.merge


class VisionBuilder(CheckedTensors):
    """Builds the program of an image encoder, which reads the patches of one tile and writes rows for a text model.
    Each method appends steps in the order of computation. If `rms`, norms do not subtract the mean."""

    def __init__(self, model: ModelFile, hyperparameters: VisionHyperparameters) -> None:
        super().__init__(model)
        self.hyperparameters = hp = hyperparameters
        self.rms = False
        self.hidden = Buffer("hidden", hp.embedding_length)
        self._steps: list[steps.Step] = []
        pixels = CHANNELS * hp.patch_size * hp.patch_size
        self._patches = Buffer("patches", pixels + hp.added_width)
        self._pixels = Buffer("pixels", pixels) if hp.added_width else self._patches

    def program(self, out: Buffer) -> Program:
        """Returns the image encoder's program, which reads the patches of a tile and writes `out`."""
        layers = self.hyperparameters.block_count
        return Program(1, layers + 1, layers + 2, self._patches, out, tuple(self._steps))

    def append(self, *added: steps.Step) -> None:
        self._steps += added

    def embed(self, *, bias: bool = True, norm: str | None = None) -> None:
        """Appends the embedding of patches, followed by the norm named `norm` if given."""
        hp, embedded = self.hyperparameters, self.hidden
        if hp.added_width:
            self.append(steps.Slice(self._patches, self._pixels, 0))
        self._embed_pixels(embedded, bias and self.has(PATCH_BIAS))
        if norm is not None:
            self.norm(norm, embedded, embedded)
        if hp.added_width:
            added = Buffer("added", hp.added_width)
            self.append(steps.Slice(self._patches, added, self._pixels.width), steps.Add(embedded, added, embedded))
        if self.has("v.pre_ln.weight"):
            self.norm("v.pre_ln", self.hidden, self.hidden)

    def _embed_pixels(self, embedded: Buffer, has_bias: bool) -> None:
        shape = (embedded.width, self._pixels.width)
        bias = self.vector(PATCH_BIAS, embedded.width) if has_bias else None
        self.append(steps.MatMul(self._pixels, embedded, self.weight(PATCH_WEIGHT, shape), bias))
        if self.has(SECOND_PATCH_WEIGHT):  # Video models have a weight for each of two frames. Both multiply an image.
            second = Buffer("second", embedded.width)
            self.append(
                steps.MatMul(self._pixels, second, self.weight(SECOND_PATCH_WEIGHT, shape)),
                steps.Add(embedded, second, embedded),
            )

    def linear(self, name: str, x: Buffer, out: Buffer) -> None:
        """Appends out = x @ weight (+ bias). If the file has limits for the matrix, x and out are clamped to them."""
        product = self.product(name, x, out)
        if not self.has(f"{name}.input_min"):
            self.append(product)
            return
        inner = Buffer(f"clamped {x.name}", x.width)
        self.append(self._clamp(f"{name}.input", x, inner), replace(product, x=inner))
        self.append(self._clamp(f"{name}.output", out, out))

    def _clamp(self, name: str, x: Buffer, out: Buffer) -> steps.Clamp:
        low, high = (self.vector(f"{name}_{end}", 1) for end in ("min", "max"))
        return steps.Clamp(x, out, low, high)

    def attention(self, layer: int, variant: VisionAttention = _PLAIN) -> None:
        hp, prefix = self.hyperparameters, f"v.blk.{layer}"
        query, key, value, attended, projected = (
            Buffer(name, hp.embedding_length) for name in ("query", "key", "value", "attended", "projected")
        )
        normed = self._normed(f"{prefix}.ln1")
        self._project(prefix, normed, query, key, value)
        self._norm_heads(prefix, query, key)
        if variant.rotation is not None:
            for x in (query, key):
                self._rotate(x, variant.rotation)
        if variant.unit_values:
            self.append(steps.RmsNorm(value, value, None, hp.epsilon, hp.head_count))
        self.append(self._attend((query, key, value, attended), variant))
        self.linear(f"{prefix}.attn_out", attended, projected)
        self._add(projected, f"{prefix}.ls1", f"{prefix}.attn_post_norm" if variant.post_norm else None)

    def _attend(self, buffers: tuple[Buffer, Buffer, Buffer, Buffer], variant: VisionAttention) -> steps.Attention:
        hp = self.hyperparameters
        return steps.Attention(
            *buffers,
            layer=1,  # All layers share one KV memory.
            heads=hp.head_count,
            kv_heads=hp.head_count,
            head_dim=hp.head_dim,
            scale=1 / math.sqrt(hp.head_dim) if variant.scale is None else variant.scale,
            kv_type=KvType.F16,
            causal=False,
            grouped=variant.grouped,
        )

    def _project(self, prefix: str, normed: Buffer, *parts: Buffer) -> None:
        if self.has(f"{prefix}.attn_qkv.weight"):
            self.append(*self.product_parts(f"{prefix}.attn_qkv", normed, parts))
            return
        for name, out in zip(("attn_q", "attn_k", "attn_v"), parts, strict=True):
            self.linear(f"{prefix}.{name}", normed, out)

    def _norm_heads(self, prefix: str, query: Buffer, key: Buffer) -> None:
        for name, x in (("attn_q_norm", query), ("attn_k_norm", key)):
            if self.has(f"{prefix}.{name}.weight"):
                self.norm(f"{prefix}.{name}", x, x, self.hyperparameters.head_count)

    def _rotate(self, x: Buffer, rotation: Rotation) -> None:
        heads, width = self.hyperparameters.head_count, self.hyperparameters.head_dim
        style, table, sections = rotation.style, rotation.table, rotation.sections
        if not rotation.split:
            self.append(steps.Rope(x, heads, width, style, table, sections))
            return
        halves = [Buffer(f"half {number} of {x.name}", x.width // 2) for number in range(2)]
        pairs = len(table.frequencies)
        for number, half in enumerate(halves):
            own = sections[number * pairs : (number + 1) * pairs]
            self.append(steps.Slice(x, half, number * width // 2, heads))
            self.append(steps.Rope(half, heads, width // 2, style, table, own))
        first, second = halves
        self.append(steps.Join(first, second, x, heads))

    def feed_forward(self, layer: int, *, out: Buffer | None = None, norm: str = "ln2") -> None:
        """Appends the steps of hidden += down(activation(up)), or of hidden += down(activation(gate) * up) if the file
        has a gate. If `out` is given, it gets the sum and becomes the hidden state. `norm` names the norm before the
        block."""
        prefix, activation = f"v.blk.{layer}", self.hyperparameters.activation
        normed = self._normed(f"{prefix}.{norm}")
        up_name, down_name = self._inner_names(prefix)
        up = Buffer("up", self.width(up_name))
        inner = Buffer("inner", up.width)
        self.linear(up_name, normed, up)
        if self.has(f"{prefix}.ffn_gate.weight"):
            self.linear(f"{prefix}.ffn_gate", normed, inner)
            self.append(steps.Activate(inner, inner, activation), steps.Mul(inner, up, inner))
        else:
            self.append(steps.Activate(up, inner, activation))
        projected = Buffer("projected", self.hidden.width)
        self.linear(down_name, inner, projected)
        self._add(projected, f"{prefix}.ls2", f"{prefix}.ffn_post_norm", out)

    def _inner_names(self, prefix: str) -> tuple[str, str]:
        """Returns the names of the up and down tensors. Only exchanged names fit the widths of old SigLIP files. Equal
        widths fit both, but no old file has equal widths."""
        names = f"{prefix}.ffn_up", f"{prefix}.ffn_down"
        fits = [
            self.model.tensor(f"{name}.weight").shape[-1] == self.hyperparameters.embedding_length for name in names
        ]
        return names[::-1] if fits == [False, True] else names

    def _normed(self, name: str) -> Buffer:
        normed = Buffer("normed", self.hidden.width)
        self.norm(name, self.hidden, normed)
        return normed

    def _add(self, x: Buffer, scale: str, norm: str | None, out: Buffer | None = None) -> None:
        if norm is not None and self.has(f"{norm}.weight"):
            self.norm(norm, x, x)
        if self.has(f"{scale}.weight"):
            self.append(steps.ScaleByWeight(x, x, self.vector(f"{scale}.weight", x.width), by_channel=True))
        out = out or Buffer("hidden", self.hidden.width)
        self.append(steps.Add(self.hidden, x, out))
        self.hidden = out

    def norm(self, name: str, x: Buffer, out: Buffer, heads: int = 1, epsilon: float | None = None) -> None:
        """Appends out = norm(x). If the weight has the width of one head, norms the `heads` heads separately."""
        epsilon = epsilon or self.hyperparameters.epsilon
        if self.rms:
            parts = heads if self.model.tensor(f"{name}.weight").shape == (x.width // heads,) else 1
            weight = self.vector(f"{name}.weight", x.width // parts)
            self.append(steps.RmsNorm(x, out, weight, epsilon, parts))
            return
        weight = self.vector(f"{name}.weight", x.width)
        self.append(steps.LayerNorm(x, out, weight, self.optional_vector(f"{name}.bias", x.width), epsilon))

    def merge(self, x: Buffer) -> Buffer:
        factor = self.hyperparameters.merged
        if factor == 1:
            return x
        merged = Buffer("merged", factor * x.width)
        self.append(steps.MergeRows(x, merged, factor))
        return merged

    def perceptron(self, x: Buffer, names: Sequence[str], activation: ActivationFunction, out: str) -> Buffer:
        first, second = names
        inner, result = Buffer(f"{out} inner", self.width(first)), Buffer(out, self.width(second))
        self.append(self.product(first, x, inner))
        self.append(steps.Activate(inner, inner, activation), self.product(second, inner, result))
        return result

    def width(self, name: str) -> int:
        shape = self.model.tensor(f"{name}.weight").shape
        if len(shape) != 2:
            raise self.error(f"{name}.weight", f"expected 2 dimensions, found {len(shape)}")
        return shape[0]
