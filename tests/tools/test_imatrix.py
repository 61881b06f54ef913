"""Checks that an importance matrix has the squared inputs of each matrix and expert in the reference backend, and that
quantization uses each expert's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.quantize import as_importance, quantize
from llamaclust.kernels.reference import backend as reference
from llamaclust.kernels.reference.steps import State, matmul, of_heads, run_step, silu
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.imatrix import Importance, ImportanceMatrix
from llamaclust.model.loader import Model
from llamaclust.model.program import HeadMatMul, MatMul, Moe, Step
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize.imatrix import collect
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.quantize import plan_quantizing, write_quantized
from llamaclust.tools.quantize.type_choice import MixChoice
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

Floats = NDArray[np.floating]
TOKENS = 80
"""Number of tokens, more than are computed at once."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return build_tiny_model(folder / "tiny.gguf", layers=2, experts=4, hidden=256, ffn=256, vocabulary=300)


def _squares(x: Floats) -> Floats:
    squares: Floats = np.einsum("rk,rk->k", x, x, dtype=np.float64)
    return squares


def _expected(model: Model, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, Floats]]:
    """Returns sums of squared inputs by tensor and expert, from a run of the reference backend."""
    found: dict[str, dict[int, Floats]] = {}

    def watched(step: Step, state: State) -> None:
        if isinstance(step, MatMul):
            found[step.weight] = {0: _squares(state[step.x])}
        if isinstance(step, HeadMatMul):
            heads = of_heads(state[step.x], step.heads)
            found[step.weight] = {head: _squares(heads[:, head]) for head in range(step.heads)}
        if isinstance(step, Moe) and step.options.normalized:
            _of_experts(step, state, found)
        run_step(step, state)

    monkeypatch.setattr(reference, "run_step", watched)
    program = model.program(0, model.layer_count)
    rows, blocks = np.arange(TOKENS, dtype=np.int32), np.arange(-(-TOKENS // 16), dtype=np.int32)
    limits = StageLimits(TOKENS, TOKENS, 1, TOKENS, len(blocks))
    stage = reference.ReferenceBackend().load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    starts, table = np.array([0, TOKENS], np.int32), np.array([0, len(blocks)], np.int32)
    stage.run(Batch(np.array(tokens, np.int32), rows, starts, table, blocks, rows), None)
    return found


def _of_experts(step: Moe, state: State, found: dict[str, dict[int, Floats]]) -> None:
    assert step.gate is not None
    x, weights = state[step.x], state.weights
    found[step.router] = {0: _squares(x)}
    chosen = np.argsort(-matmul(x, weights[step.router]), axis=1, kind="stable")[:, : step.used]
    for expert in range(step.experts):
        mine = x[(chosen == expert).any(axis=1)]
        gate, up = (matmul(mine, weights[name][expert]) for name in (step.gate, step.up))
        for name, inner in ((step.gate, mine), (step.up, mine), (step.down, silu(gate) * up)):
            found.setdefault(name, {})[expert] = _squares(inner)


def test_sums_are_those_of_the_reference(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tuple(int(token) for token in np.random.default_rng(2).integers(0, 300, TOKENS))
    with Model.open(path) as model:
        matrix = collect(model, [tokens], 2, "text", True, lambda what, done, total: None)
        expected = _expected(model, tokens, monkeypatch)
    assert matrix.entries.keys() == expected.keys()
    for name, experts in expected.items():
        for expert, squares in experts.items():
            np.testing.assert_allclose(matrix.entries[name].sums[expert], squares, rtol=0.02, err_msg=name)
    counts = matrix.entries["blk.1.ffn_up_exps.weight"].counts
    assert counts.sum() == 2 * TOKENS and len(set(counts.tolist())) > 1


def test_each_head_has_sums_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks matrices of latent attention."""
    tokens = tuple(int(token) for token in np.random.default_rng(3).integers(0, 300, TOKENS))
    with Model.open(build_architecture(tmp_path / "m.gguf", "deepseek2-lite")) as model:
        matrix = collect(model, [tokens], 2, "text", True, lambda what, done, total: None)
        expected = _expected(model, tokens, monkeypatch)
    for name in ("blk.0.attn_k_b.weight", "blk.3.attn_v_b.weight"):
        entry, heads = matrix.entries[name], expected[name]
        assert len(entry.sums) == len(heads) == 2 and entry.counts.tolist() == [TOKENS, TOKENS]
        for head, squares in heads.items():
            np.testing.assert_allclose(entry.sums[head], squares, rtol=0.02, err_msg=name)


def test_each_expert_is_quantized_by_its_own_importance(path: Path, tmp_path: Path) -> None:
    name, random = "blk.1.ffn_up_exps.weight", np.random.default_rng(4)
    sums = np.exp(2 * random.standard_normal((4, 256))).astype(np.float32)
    matrix = ImportanceMatrix({name: Importance(sums, np.ones(4, np.float32))}, 1, 64, ())
    job = plan_quantizing(open_model(path), MixChoice(MIXES["Q4_0"]), matrix, False)
    write_quantized(job, tmp_path / "out.gguf", 2, False, lambda what, done, total: None)
    before, after = open_model(path).tensor(name), open_model(tmp_path / "out.gguf").tensor(name)
    x = np.frombuffer(before.read(), np.float16).astype(np.float32).reshape(before.shape)
    written = np.frombuffer(after.read(), np.uint8).reshape(4, -1)
    for expert in range(4):
        wanted = quantize(QuantType.Q4_0, x[expert], as_importance(sums[expert]))
        assert (written[expert] == wanted.reshape(-1)).all(), expert
