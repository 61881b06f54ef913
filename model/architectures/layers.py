"""The pieces that architectures are put together from; every weight is checked against the file as it is named."""

from __future__ import annotations

import math

import numpy as np

from llamaclust.errors import ModelFileError
from llamaclust.model.architectures.rope import rope_table
from llamaclust.model.gguf import ModelFile
from llamaclust.model.hyperparameters import Hyperparameters
from llamaclust.model.program import (
    Add,
    Attention,
    Buffer,
    Embed,
    KvType,
    MatMul,
    Moe,
    Program,
    RmsNorm,
    Rope,
    RopeStyle,
    RopeTable,
    SelectRows,
    SiluMul,
    Step,
)
from llamaclust.model.quant_types import QuantType

_EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""The one tensor that becomes part of the program and not one of its weights."""


class ProgramBuilder:
    """Collects the steps of layers [start, end). Methods append in the order of computation."""

    def __init__(
        self, model: ModelFile, hyperparameters: Hyperparameters, start: int, end: int, kv_type: KvType
    ) -> None:
        assert 0 <= start < end <= hyperparameters.block_count, (start, end, hyperparameters.block_count)
        self.model = model
        self.hyperparameters = hyperparameters
        self.start = start
        self.end = end
        self._kv_type = kv_type
        self._steps: list[Step] = []
        width = hyperparameters.embedding_length
        self._hidden = Buffer("hidden", width)
        self._normed = Buffer("normed", width)
        self._projected = Buffer("projected", width)
        self._out = self._hidden

    def program(self) -> Program:
        layers = self.hyperparameters.block_count
        return Program(self.start, self.end, layers, self._hidden, self._out, tuple(self._steps))

    def embed(self) -> None:
        """On a first stage: token ids to hidden states."""
        if self.start == 0:
            shape = (self.hyperparameters.vocabulary_size, self.hyperparameters.embedding_length)
            self._steps.append(Embed(self._hidden, self.weight(_EMBEDDING, shape)))

    def head(self) -> None:
        """On a last stage: wanted rows, norm and logits. Without `output.weight` the embedding is used again."""
        if self.end < self.hyperparameters.block_count:
            return
        self._out = Buffer("logits", self.hyperparameters.vocabulary_size)
        selected = Buffer("selected", self._hidden.width)
        self._steps.append(SelectRows(self._hidden, selected))
        self._norm("output_norm", selected)
        weight = "output" if "output.weight" in self.model.tensors else _EMBEDDING.removesuffix(".weight")
        self._matmul(weight, self._normed, self._out)

    def attention(self, layer: int, style: RopeStyle, table: RopeTable, window: int | None = None) -> None:
        """hidden += output(attention(rope(q), rope(k), v)) of the normed hidden state. `window`: as of `Attention`."""
        hp, prefix = self.hyperparameters, f"blk.{layer}"
        query, out = Buffer("query", hp.query_width), Buffer("attended", hp.query_width)
        key, value = Buffer("key", hp.kv_width), Buffer("value", hp.kv_width)
        self._norm(f"{prefix}.attn_norm", self._hidden)
        self._matmul(f"{prefix}.attn_q", self._normed, query)
        self._matmul(f"{prefix}.attn_k", self._normed, key)
        self._matmul(f"{prefix}.attn_v", self._normed, value)
        self._steps += [
            Rope(query, hp.head_count, hp.key_length, style, table),
            Rope(key, hp.head_count_kv, hp.key_length, style, table),
            Attention(
                query,
                key,
                value,
                out,
                layer=layer,
                heads=hp.head_count,
                kv_heads=hp.head_count_kv,
                head_dim=hp.key_length,
                scale=1 / math.sqrt(hp.key_length),
                kv_type=self._kv_type,
                window=window,
            ),
        ]
        self._matmul(f"{prefix}.attn_output", out, self._projected)
        self._steps.append(Add(self._hidden, self._projected, self._hidden))

    def feed_forward(self, layer: int) -> None:
        """hidden += down(silu(gate) * up) of the normed hidden state."""
        prefix = f"blk.{layer}"
        gate = Buffer("gate", self.hyperparameters.feed_forward_length)
        up = Buffer("up", self.hyperparameters.feed_forward_length)
        self._norm(f"{prefix}.ffn_norm", self._hidden)
        self._matmul(f"{prefix}.ffn_gate", self._normed, gate)
        self._matmul(f"{prefix}.ffn_up", self._normed, up)
        self._steps.append(SiluMul(gate, up, gate))
        self._matmul(f"{prefix}.ffn_down", gate, self._projected)
        self._steps.append(Add(self._hidden, self._projected, self._hidden))

    def experts(self, layer: int) -> None:
        """hidden += the weighted best experts, of the normed hidden state."""
        hp, prefix = self.hyperparameters, f"blk.{layer}"
        old = f"{prefix}.ffn_gate.0.weight"
        if old in self.model.tensors:
            raise self.error(old, "one tensor for each expert, the form of early 2024", "convert the model again")
        width, ffn, count = hp.embedding_length, hp.expert_feed_forward_length, hp.expert_count
        self._norm(f"{prefix}.ffn_norm", self._hidden)
        self._steps += [
            Moe(
                self._normed,
                self._projected,
                router=self.weight(f"{prefix}.ffn_gate_inp.weight", (count, width)),
                gate=self.weight(f"{prefix}.ffn_gate_exps.weight", (count, ffn, width)),
                up=self.weight(f"{prefix}.ffn_up_exps.weight", (count, ffn, width)),
                down=self.weight(f"{prefix}.ffn_down_exps.weight", (count, width, ffn)),
                experts=count,
                used=hp.expert_used_count,
                ffn_width=ffn,
            ),
            Add(self._hidden, self._projected, self._hidden),
        ]

    def rope_table(self) -> RopeTable:
        """The rotation of every layer."""
        return rope_table(self.hyperparameters.rope, self._rope_factors())

    def _rope_factors(self) -> tuple[float, ...] | None:
        """What `rope_freqs.weight` divides the frequencies by (since llama 3.1), None where there is no such tensor."""
        if ROPE_FACTORS not in self.model.tensors:
            return None
        self._vector(ROPE_FACTORS, self.hyperparameters.rope.dimension_count // 2)
        values = np.frombuffer(self.model.tensor(ROPE_FACTORS).read(), "<f4")
        if not (np.isfinite(values) & (values > 0)).all():
            raise self.error(ROPE_FACTORS, "holds factors that are not positive numbers")
        return tuple(values.tolist())

    def require(self, layer: int, *names: str) -> None:
        """ModelFileError where one of the layer's tensors is missing."""
        for name in names:
            self.model.tensor(f"blk.{layer}.{name}")

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """`name`, once the file is known to have such a tensor."""
        found = self.model.tensor(name).shape
        if found != shape:
            raise self.error(name, f"shape {list(reversed(found))}, {list(reversed(shape))} expected")
        return name

    def error(self, tensor: str, what: str, advice: str = "the file is not usable, take another one") -> ModelFileError:
        return ModelFileError(f"{self.model.path}: tensor {tensor}: {what}; {advice}")

    def _vector(self, name: str, width: int) -> str:
        self.weight(name, (width,))
        found = self.model.tensor(name).quant_type
        if found is not QuantType.F32:
            raise self.error(name, f"type {found.name}, F32 expected")
        return name

    def _norm(self, name: str, x: Buffer) -> None:
        weight = self._vector(f"{name}.weight", x.width)
        self._steps.append(RmsNorm(x, self._normed, weight, self.hyperparameters.rms_epsilon))

    def _matmul(self, name: str, x: Buffer, out: Buffer) -> None:
        """A bias is added where the file has one."""
        weight = self.weight(f"{name}.weight", (out.width, x.width))
        bias = f"{name}.bias"
        has_bias = bias in self.model.tensors
        self._steps.append(MatMul(x, out, weight, self._vector(bias, out.width) if has_bias else None))
