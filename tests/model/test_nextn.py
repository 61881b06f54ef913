"""Compares the program of an MTP head with its arithmetic in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Batch
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.nextn.costs import with_nextn as costs_with_nextn
from llamaclust.model.nextn.program import FAMILIES, has_nextn, nextn_program
from support.models.tiny.nextn_models import with_nextn
from support.models.tiny_architectures import VOCABULARY, build_architecture
from support.seed import SEED

Float64 = NDArray[np.float64]
_ROWS, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _ROTATED = 20, 64, 4, 2, 16, 8
_EPSILON = 1e-5


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return Model.open(with_nextn(tmp_path / "model.gguf", request.param))


class GlmNextn:
    """An MTP head of GLM 4.5 by the DeepSeek V3 report (section 2.2), around a decoder layer of GLM."""

    def __init__(self, model: Model) -> None:
        self._tensors = {
            name: np.frombuffer(tensor.read(), np.float32).reshape(tensor.shape).astype(np.float64)
            for name, tensor in model.file.tensors.items()
        }
        self._layer = f"blk.{model.layer_count}"
        self.margins = np.zeros(_ROWS)  # the margin of each row's last chosen expert over the best other one

    def logits(self, tokens: NDArray[np.int32], before: Float64) -> Float64:
        embedded = self._norm(self._tensors["token_embd.weight"][tokens], "nextn.enorm")
        x = np.concatenate([embedded, self._norm(before, "nextn.hnorm")], axis=1) @ self._weight("nextn.eh_proj").T
        x = x + self._attention(self._norm(x, "attn_norm"))
        x = x + self._experts(self._norm(x, "post_attention_norm"))
        return np.asarray(self._norm(x, "nextn.shared_head_norm") @ self._tensors["output.weight"].T)

    def _weight(self, name: str) -> Float64:
        return self._tensors[f"{self._layer}.{name}.weight"]

    def _bias(self, name: str) -> Float64:
        return self._tensors[f"{self._layer}.{name}.bias"]

    def _norm(self, x: Float64, name: str) -> Float64:
        return np.asarray(x / np.sqrt((x**2).mean(axis=1, keepdims=True) + _EPSILON) * self._weight(name))

    def _attention(self, x: Float64) -> Float64:
        q, k, v = (x @ self._weight(name).T + self._bias(name) for name in ("attn_q", "attn_k", "attn_v"))
        q, k = _rotated(q.reshape(_ROWS, _HEADS, _HEAD_DIM)), _rotated(k.reshape(_ROWS, _KV_HEADS, _HEAD_DIM))
        v = v.reshape(_ROWS, _KV_HEADS, _HEAD_DIM)
        out = np.empty_like(q)
        for head in range(_HEADS):
            group = head // (_HEADS // _KV_HEADS)
            scores = q[:, head] @ k[:, group].T / np.sqrt(_HEAD_DIM)
            scores[np.triu_indices(_ROWS, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
        return np.asarray(out.reshape(_ROWS, -1) @ self._weight("attn_output").T)

    def _experts(self, x: Float64) -> Float64:
        gates = 1 / (1 + np.exp(-x @ self._weight("ffn_gate_inp").T))
        biased = gates + self._bias("exp_probs_b")
        chosen = np.argsort(-biased, axis=1, kind="stable")[:, :3]
        ordered = np.sort(biased, axis=1)
        self.margins = ordered[:, -3] - ordered[:, -4]
        out = _inner(x, *(self._weight(f"ffn_{part}_shexp") for part in ("gate", "up", "down")))
        matrices = [self._weight(f"ffn_{part}_exps") for part in ("gate", "up", "down")]
        for row, experts in enumerate(chosen):
            weights = gates[row, experts] / gates[row, experts].sum() * 2.5
            for expert, weight in zip(experts, weights, strict=True):
                out[row] += weight * _inner(x[row : row + 1], *(matrix[expert] for matrix in matrices))[0]
        return out


def _inner(x: Float64, gate: Float64, up: Float64, down: Float64) -> Float64:
    gated = x @ gate.T
    return np.asarray((gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T)


def _rotated(x: Float64) -> Float64:
    """Rotates the first channels of each head, in pairs half of them apart."""
    half = _ROTATED // 2
    angles = np.arange(_ROWS)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:_ROTATED]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., _ROTATED:]], axis=2)


def _batch(tokens: NDArray[np.int32]) -> Batch:
    return Batch(
        tokens=tokens,
        positions=np.arange(_ROWS, dtype=np.int32),
        sequence_starts=np.array([0, _ROWS], np.int32),
        table_starts=np.array([0, 2], np.int32),
        block_tables=np.array([3, 1], np.int32),
        output_rows=np.arange(_ROWS, dtype=np.int32),
    )


@pytest.mark.parametrize("backend", [CpuBackend(1), ReferenceBackend()], ids=["cpu", "reference"])
def test_logits_are_those_of_the_published_arithmetic(tmp_path: Path, backend: Backend) -> None:
    model, source = Model.open(with_nextn(tmp_path / "model.gguf")), np.random.default_rng(SEED)
    tokens = source.integers(0, VOCABULARY, _ROWS, np.int32)
    before = source.standard_normal((_ROWS, _HIDDEN)).astype(np.float32)
    program = nextn_program(model)
    stage = backend.load(program, model.tensors_for(program), StageLimits(64, 32, 2, 256, 8), lambda _: None)
    found = stage.run(_batch(tokens), before)
    exact, head = before.astype(np.float64), GlmNextn(model)
    wanted = head.logits(tokens, exact)
    same_experts = head.margins > 0.01  # keys and values are float16: a row with nearly tied experts may choose another
    assert same_experts.sum() > _ROWS / 2, f"seed {SEED}"
    error = np.linalg.norm((found - wanted)[same_experts]) / np.linalg.norm(wanted[same_experts])
    assert error < 2e-3, f"seed {SEED}"
    assert np.linalg.norm(head.logits(tokens, 2 * exact[::-1]) - wanted) > 0.1 * np.linalg.norm(wanted)


def test_the_backends_agree_on_every_family(model: Model) -> None:
    source, program = np.random.default_rng(SEED), nextn_program(model)
    tokens = source.integers(0, VOCABULARY, _ROWS, np.int32)
    before = source.standard_normal((_ROWS, _HIDDEN)).astype(np.float32)
    logits, normed = [], []
    for backend in (CpuBackend(2), ReferenceBackend()):
        stage = backend.load(program, model.tensors_for(program), StageLimits(64, 32, 2, 256, 8), lambda _: None)
        logits.append(stage.run(_batch(tokens), before).copy())
        normed.append(stage.normed(np.arange(_ROWS, dtype=np.int32)))
    for ours, reference in (logits, normed):
        assert np.abs(ours - reference).max() < 1e-3 * np.abs(reference).max(), f"seed {SEED}"


def test_a_head_has_a_layer_behind_the_others_and_reads_their_normed_state(model: Model) -> None:
    program, layers = nextn_program(model, KvType.Q8_0), model.layer_count
    assert (program.start, program.end) == (layers, layers + 1)
    assert program.is_last and not program.is_first and program.has_logits
    assert [step.layer for step in program.kv_layers] == [layers]
    assert {step.kv_type for step in program.kv_layers} == {KvType.Q8_0}
    ends = {"token_embd.weight", "output.weight"} & {*model.file.tensors}
    assert ends <= {*program.weights}
    named = {name for name in model.file.tensors if name.startswith(f"blk.{layers}.")}
    assert named <= {*program.weights}


def test_tensors_of_its_own_take_the_place_of_the_models(tmp_path: Path) -> None:
    model = Model.open(with_nextn(tmp_path / "model.gguf"))
    prefix, tensors = f"blk.{model.layer_count}.nextn", model.file.tensors
    sources = [TensorSource(name, t.quant_type, t.shape, t.read) for name, t in tensors.items()]
    for name, of in (("embed_tokens", "token_embd"), ("shared_head_head", "output")):
        tensor = tensors[f"{of}.weight"]
        sources.append(TensorSource(f"{prefix}.{name}.weight", tensor.quant_type, tensor.shape, tensor.read))
    without_norm = [source for source in sources if source.name != f"{prefix}.shared_head_norm.weight"]
    write_gguf(tmp_path / "own.gguf", dict(model.file.metadata), without_norm)
    weights = nextn_program(Model.open(tmp_path / "own.gguf")).weights
    assert {f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head_head.weight", "output_norm.weight"} <= {*weights}
    assert not {"token_embd.weight", "output.weight"} & {*weights}


def test_a_model_without_a_known_head_is_refused(tmp_path: Path) -> None:
    for name in ("glm4moe", "qwen3"):
        model = Model.open(build_architecture(tmp_path / f"{name}.gguf", name))
        assert not has_nextn(model)
        with pytest.raises(UsageError, match=r"has no head for multi-token prediction"):
            nextn_program(model)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = Model.open(with_nextn(tmp_path / "model.gguf"))
    sources = [TensorSource(name, t.quant_type, t.shape, t.read) for name, t in model.file.tensors.items()]
    wrong = [
        TensorSource(source.name, source.quant_type, (_HIDDEN, _HIDDEN), lambda: bytes(4 * _HIDDEN * _HIDDEN))
        if source.name.endswith("eh_proj.weight")
        else source
        for source in sources
    ]
    write_gguf(tmp_path / "wrong.gguf", dict(model.file.metadata), wrong)
    with pytest.raises(ModelFileError, match=r"eh_proj.weight: expected shape \[128, 64\], found \[64, 64\]"):
        nextn_program(Model.open(tmp_path / "wrong.gguf"))


def test_costs_have_its_layer_and_what_a_token_does_not_read(model: Model) -> None:
    plain = model.costs(KvType.F16)
    found = costs_with_nextn(model, plain, KvType.F16)
    own = [tensor for name, tensor in model.file.tensors.items() if name.startswith(f"blk.{model.layer_count}.")]
    added = sum(tensor.resident_bytes for tensor in own)
    if "output.weight" in model.file.tensors:  # otherwise the last stage already has the embedding
        assert found.nextn_embedding_bytes == model.file.tensor("token_embd.weight").resident_bytes
    before, last = plain.layers[-1], found.layers[-1]
    assert last.weight_bytes - before.weight_bytes + found.nextn_bytes == added
    own_kv_bytes = sum(step.kv_token_bytes for step in nextn_program(model).kv_layers)
    assert last.kv_bytes_per_token - before.kv_bytes_per_token == own_kv_bytes > 0
    assert last.macs_per_token > before.macs_per_token
    assert found.head_bytes == plain.head_bytes and found.layers[:-1] == plain.layers[:-1]
