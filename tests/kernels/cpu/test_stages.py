"""Tests on every backend that a model gives equal bits for any cuts, chunks and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llamaclust.kernels.backend import Backend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import Chain, batch_of
from support.models.tiny_model import build_tiny_model

LAYERS, TOKENS = 4, 40
SMALL = {"hidden": 64, "heads": 2, "kv_heads": 1, "ffn": 96}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"quant_type": QuantType.Q4_K, "ffn": 256},
    "llama-tied": {"quant_type": QuantType.Q8_0, "tied": True, **SMALL},
    "llama3": {"quant_type": QuantType.Q4_1, "rope_factors": True, **SMALL},
    "qwen2": {"architecture": "qwen2", "quant_type": QuantType.Q6_K, "ffn": 256},
    "grid": {"quant_type": QuantType.IQ2_XS, "ffn": 256},
    "moe": {"experts": 4, "quant_type": QuantType.F16, **SMALL},
    "table": {"quant_type": QuantType.IQ4_XS, "ffn": 256},
    "table-moe": {"experts": 4, "quant_type": QuantType.MXFP4, **SMALL},
    "ternary": {"quant_type": QuantType.TQ1_0, "ffn": 256},
}


@dataclass(frozen=True, slots=True)
class Whole:
    """A model on a backend, and its logits of one sequence in one batch."""

    backend: Backend
    model: Model
    tokens: list[int]
    logits: NDArray[np.float32]


@pytest.fixture(scope="module")
def make_whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Whole]:
    folder, made = tmp_path_factory.mktemp("stages"), dict[tuple[str, str], Whole]()

    def make(backend_name: str, model_name: str) -> Whole:
        key = backend_name, model_name
        if key not in made:
            path = folder / f"{model_name}.gguf"
            if not path.exists():
                build_tiny_model(path, layers=LAYERS, **MODELS[model_name])
            model, backend = Model.open(path), BACKENDS[backend_name]()
            tokens = np.random.default_rng(11).integers(0, model.hyperparameters.vocabulary_size, TOKENS).tolist()
            chain = Chain(backend, model)
            made[key] = Whole(backend, model, tokens, chain.logits(tokens))
            chain.close()
        return made[key]

    return make


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("backend_name", BACKENDS)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_stages_in_a_chain_give_the_bits_of_one(
    make_whole: Callable[[str, str], Whole], backend_name: str, model_name: str, data: st.DataObject
) -> None:
    whole = make_whole(backend_name, model_name)
    cuts = sorted(data.draw(st.sets(st.integers(1, LAYERS - 1), min_size=1)))
    chunk = data.draw(st.sampled_from([1, 3, 7, 16, 17, TOKENS]))
    table = data.draw(st.permutations(range(20)))[:3]
    chain = Chain(whole.backend, whole.model, cuts)
    logits = chain.logits(whole.tokens, chunk, table)
    chain.close()
    np.testing.assert_array_equal(logits.view(np.uint32), whole.logits.view(np.uint32))


@pytest.mark.parametrize("model_name", ["llama", "moe"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_neighbours_in_a_batch_do_not_matter(
    make_whole: Callable[[str, str], Whole], backend_name: str, model_name: str
) -> None:
    """Three sequences at different positions decode and prefill together, with outputs of only some rows."""
    whole = make_whole(backend_name, model_name)
    chain = Chain(whole.backend, whole.model, cuts=[2])
    tokens, logits = whole.tokens, whole.logits
    tables = [[9, 4, 6], [1, 2, 3], [0, 5, 8]]
    chain.run(batch_of([(tokens[:39], range(39), tables[0]), (tokens[:20], range(20), tables[1])], outputs=[5]))
    mixed = [
        (tokens[39:], [39], tables[0]),
        (tokens[20:33], range(20, 33), tables[1]),
        (tokens[:11], range(11), tables[2]),
    ]
    rows = chain.run(batch_of(mixed, outputs=[0, 1, 13, 24]))
    chain.close()
    np.testing.assert_array_equal(rows.view(np.uint32), logits[[39, 20, 32, 10]].view(np.uint32))


def test_levels_and_thread_counts_of_the_cpu_agree(make_whole: Callable[[str, str], Whole]) -> None:
    names = [name for name in BACKENDS if name != "reference"]
    for model_name in MODELS:
        found = {name: make_whole(name, model_name).logits.view(np.uint32) for name in names}
        for name, logits in found.items():
            np.testing.assert_array_equal(logits, found[names[0]], f"{model_name} on {name}")


@pytest.mark.parametrize("model_name", MODELS)
def test_the_logits_are_worth_comparing(make_whole: Callable[[str, str], Whole], model_name: str) -> None:
    logits = make_whole("reference", model_name).logits
    assert np.isfinite(logits).all()
    assert len({int(row.argmax()) for row in logits}) > TOKENS // 4
    assert logits.std() > 0.5
