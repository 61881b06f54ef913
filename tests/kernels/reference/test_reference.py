"""Tests of the NumPy backend against gguf-py's numbers and against formulas computed element by element."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch, kv_bytes
from llamaclust.kernels.reference.attention import softmax
from llamaclust.kernels.reference.backend import ReferenceBackend, ReferenceStage
from llamaclust.kernels.reference.dequantize import SUPPORTED_TYPES, dequantize
from llamaclust.kernels.reference.kv import LayerKv
from llamaclust.kernels.reference.steps import State, attention, moe, rms_norm, rope, run_step, silu
from llamaclust.model.loader import Model
from llamaclust.model.program import Add, Attention, Buffer, Moe, Rope, RopeTable, SelectRows, SiluMul
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import RopeStyle
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.quant_blocks import stream_blocks
from support.models.tiny_model import build_tiny_model
from support.paths import DATA

GOLDEN = DATA / "dequantize.npz"
"""Results of gguf-py 0.19 on `stream_blocks(type, 1024)`: the first weights and the SHA-256 of all as float32."""

Float32 = NDArray[np.float32]


def i32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


@pytest.mark.parametrize("quant_type", sorted(SUPPORTED_TYPES - {QuantType.Q1_0}), ids=lambda kind: kind.name)
def test_dequantized_weights_have_the_bits_of_gguf_py(quant_type: QuantType) -> None:
    blocks = stream_blocks(quant_type, 1024)
    weights = dequantize(quant_type, blocks.tobytes(), 1024 * quant_type.info.block_size)
    with np.load(GOLDEN) as golden:
        first, digest = golden[quant_type.name], golden[f"{quant_type.name}.sha256"]
    np.testing.assert_array_equal(weights[: len(first)].view(np.uint32), first.view(np.uint32))
    assert hashlib.sha256(weights.astype("<f4").tobytes()).digest() == digest.tobytes()
    assert len(np.unique(weights)) > 2


def test_q1_0_is_plus_or_minus_its_scale() -> None:
    block = np.frombuffer(np.float16(0.75).tobytes() + bytes([0b00000101] + [0xFF] * 7 + [0] * 8), np.uint8)
    expected = [0.75, -0.75, 0.75] + [-0.75] * 5 + [0.75] * 56 + [-0.75] * 64
    assert dequantize(QuantType.Q1_0, block, 128).tolist() == expected


def test_every_type_with_a_dot_product_is_supported() -> None:
    assert {kind for kind in QuantType if kind.info.activation is not None} == SUPPORTED_TYPES


def test_a_type_without_kernel_is_refused_by_name(tmp_path: Path) -> None:
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=1))
    program = model.program(0, 1)
    tensors = model.tensors_for(program)
    tensors["output.weight"] = replace(tensors["output.weight"], quant_type=QuantType.I8)
    with pytest.raises(
        ModelFileError, match=r"m\.gguf: tensor output\.weight: the reference backend does not support type I8"
    ):
        ReferenceBackend().load(program, tensors, StageLimits(1, 1, 1, 16, 1), lambda done: None)


def test_rms_norm() -> None:
    x = np.array([[3.0, 4.0]], np.float32)
    expected = np.array([[3, 8]]) / math.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(rms_norm(x, np.array([1, 2], np.float32), 0.5), expected)


def test_silu_at_both_ends() -> None:
    np.testing.assert_allclose(silu(np.array([-1000.0, 0, 1000])), [0, 0, 1000])


@pytest.mark.parametrize("style", RopeStyle)
def test_rope_turns_pairs_and_leaves_the_rest(style: RopeStyle) -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((2, 2 * 6), np.float32)
    table = RopeTable((1.0, 0.25), scale=1.5)
    step = Rope(Buffer("x", 12), heads=2, head_dim=6, style=style, table=table)
    out = rope(step, x, batch_of([([0, 0], [7, 8], [0])])).reshape(2, 2, 6)
    pairs = [(0, 1), (2, 3)] if style is RopeStyle.NORM else [(0, 2), (1, 3)]
    for row, position in enumerate((7, 8)):
        for head in range(2):
            original = x.reshape(2, 2, 6)[row, head]
            for (a, b), frequency in zip(pairs, table.frequencies, strict=True):
                turned = complex(original[a], original[b]) * 1.5 * np.exp(1j * position * frequency)
                np.testing.assert_allclose(out[row, head, [a, b]], [turned.real, turned.imag], rtol=1e-12)
            np.testing.assert_array_equal(out[row, head, 4:], original[4:])


def attention_step(heads: int, kv_heads: int, head_dim: int) -> Attention:
    width, kv_width = heads * head_dim, kv_heads * head_dim
    q, k, v, out = Buffer("q", width), Buffer("k", kv_width), Buffer("v", kv_width), Buffer("out", width)
    return Attention(q, k, v, out, 0, heads, kv_heads, head_dim, scale=0.3)


def attention_state(step: Attention, batch: Batch, kv: LayerKv, seed: int) -> State:
    generator = np.random.default_rng(seed)
    state = State({}, {0: kv}, batch)
    for buffer in step.reads:
        state[buffer] = generator.standard_normal((batch.rows, buffer.width), np.float32)
    return state


def test_attention_is_the_formula_over_rounded_keys_and_values() -> None:
    step, tokens = attention_step(heads=4, kv_heads=2, head_dim=8), 20
    batch = batch_of([([0] * tokens, range(tokens), [3, 1])])
    state = attention_state(step, batch, LayerKv(step, blocks=4), seed=4)
    out = attention(step, state)
    query = state[step.q].reshape(tokens, 4, 8).astype(float)
    key = state[step.k].astype(np.float16).reshape(tokens, 2, 8).astype(float)
    value = state[Buffer("v", 16)].astype(np.float16).reshape(tokens, 2, 8).astype(float)
    for row in range(tokens):
        for head in range(4):
            scores = [query[row, head] @ key[p, head // 2] * 0.3 for p in range(row + 1)]
            powers = [math.exp(score) for score in scores]
            expected = sum(power * value[p, head // 2] for p, power in enumerate(powers)) / sum(powers)
            np.testing.assert_allclose(out[row, head * 8 : head * 8 + 8], expected, rtol=1e-5, atol=1e-6)


def test_attention_keeps_sequences_apart() -> None:
    step = attention_step(heads=2, kv_heads=1, head_dim=4)
    both = batch_of([([0] * 3, range(3), [2]), ([0] * 18, range(18), [0, 3])])
    state = attention_state(step, both, LayerKv(step, blocks=4), seed=5)
    together = attention(step, state)
    for rows, table in ((slice(0, 3), [1]), (slice(3, 21), [2, 0])):
        count = rows.stop - rows.start
        alone = State({}, {0: LayerKv(step, blocks=4)}, batch_of([([0] * count, range(count), table)]))
        for buffer in step.reads:
            alone[buffer] = state[buffer][rows]
        np.testing.assert_array_equal(attention(step, alone), together[rows])


def test_kv_memory_that_was_never_stored_poisons_the_answer() -> None:
    step = attention_step(heads=1, kv_heads=1, head_dim=4)
    state = attention_state(step, batch_of([([0], [5], [0])]), LayerKv(step, blocks=1), seed=6)
    assert np.isnan(attention(step, state)).all()


def moe_step() -> Moe:
    x, out = Buffer("x", 4), Buffer("out", 4)
    return Moe(x, out, "router", "gate", "up", "down", experts=3, used=2, ffn_width=5)


def test_moe_weighs_the_best_experts() -> None:
    generator = np.random.default_rng(7)
    step, shapes = moe_step(), {"router": (3, 4), "gate": (3, 5, 4), "up": (3, 5, 4), "down": (3, 4, 5)}
    weights = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    state = State(weights, {}, batch_of([([0, 0], [0, 1], [0])]))
    state[step.x] = generator.standard_normal((2, 4), np.float32)
    out = moe(step, state)
    for row in range(2):
        x = state[step.x][row].astype(float)
        shares = softmax(weights["router"].astype(float) @ x)
        dropped = int(shares.argmin())
        expected = np.zeros(4)
        for expert in {0, 1, 2} - {dropped}:
            gate, up = weights["gate"][expert] @ x, weights["up"][expert] @ x
            expected += shares[expert] / (1 - shares[dropped]) * (weights["down"][expert] @ (silu(gate) * up))
        np.testing.assert_allclose(out[row], expected, rtol=1e-5)


def test_moe_ties_go_to_the_lower_id() -> None:
    step = moe_step()
    weights: dict[str, Float32] = {"router": np.zeros((3, 4), np.float32), "gate": np.ones((3, 5, 4), np.float32)}
    weights["up"] = np.ones((3, 5, 4), np.float32)
    weights["down"] = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((3, 4, 5), np.float32)
    state = State(weights, {}, batch_of([([0], [0], [0])]))
    state[step.x] = np.full((1, 4), 0.25, np.float32)
    np.testing.assert_allclose(moe(step, state), 0.5 * 5 * silu(np.ones((1, 4))))


def test_row_wise_steps_may_write_over_their_input() -> None:
    x, y, few = Buffer("x", 2), Buffer("y", 2), Buffer("few", 2)
    state = State({}, {}, replace(batch_of([([0] * 3, range(3), [0])]), output_rows=i32(0, 2)))
    state[x], state[y] = np.array([[0, 1], [2, 3], [4, 5]], np.float32), np.ones((3, 2), np.float32)
    run_step(Add(x, y, x), state)
    run_step(SelectRows(x, few), state)
    assert state[few].tolist() == [[1, 2], [5, 6]]
    run_step(SiluMul(few, few, few), state)
    np.testing.assert_allclose(state[few], np.array([[1, 4], [25, 36]]) / (1 + np.exp([[-1, -2], [-5, -6]])))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> ReferenceStage:
    path = build_tiny_model(tmp_path_factory.mktemp("reference") / "m.gguf", layers=2, hidden=64, ffn=96)
    loaded = load_stage(ReferenceBackend(), Model.open(path))
    assert isinstance(loaded, ReferenceStage)
    return loaded


def test_chunks_and_neighbours_do_not_change_a_bit(stage: ReferenceStage) -> None:
    generator = np.random.default_rng(8)
    tokens = generator.integers(0, 320, 30).tolist()
    whole = stage.run(batch_of([(tokens, range(30), [4, 2])]), None)
    beside = stage.run(batch_of([(tokens[:7], range(7), [0]), (tokens, range(30), [1, 3])]), None)
    np.testing.assert_array_equal(beside[7:], whole)
    for start, end in ((0, 1), (1, 17), (17, 30)):
        rows = stage.run(batch_of([(tokens[start:end], range(start, end), [5, 6])]), None)
        np.testing.assert_array_equal(rows, whole[start:end])


def test_what_memory_is_said_to_cost(tmp_path: Path) -> None:
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=3, hidden=64, heads=4, kv_heads=2, ffn=96))
    program, limits, done = model.program(0, 3), StageLimits(8, 8, 2, 64, 4), list[int]()
    backend = ReferenceBackend()
    loaded = backend.load(program, model.tensors_for(program), limits, done.append)
    assert loaded.kv_bytes == kv_bytes(program, limits) == 4 * 3 * 16 * 2 * 32 * 2
    assert sum(done) == sum(tensor.n_bytes for tensor in model.file.tensors.values())
    said = backend.workspace_bytes(program, model.tensors_for(program), limits)
    assert said == loaded.workspace_bytes == 8 * 4 * (64 * 7 + 32 * 2 + 96 * 2 + 320)


def test_more_than_the_limits_is_a_mistake_of_the_caller(stage: ReferenceStage) -> None:
    with pytest.raises(AssertionError):
        stage.run(batch_of([([1] * 300, range(300), range(19))]), None)
