"""Tests of the normed hidden states that embeddings use: equal on every backend, for all chunks and cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.loader import Model
from llamaclust.model.program import SoftCap
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import Chain, batch_of
from support.models.tiny_architectures import MODELS, TOKENS, build_architecture

NAMES = ("llama-experts", "gemma2", "gpt2", "falcon", "qwen3")


@pytest.fixture(params=[name for name in NAMES if name in MODELS])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return Model.open(build_architecture(tmp_path / "model.gguf", request.param))


def normed(backend: Backend, model: Model, chunk: int, cuts: tuple[int, ...] = (), outputs: int = 0) -> Float32:
    """Returns the normed states of all tokens; the last `outputs` rows of each chunk also have logits."""
    chain, parts = Chain(backend, model, cuts), []
    for at in range(0, len(TOKENS), chunk):
        end = min(at + chunk, len(TOKENS))
        wanted = range(max(0, end - at - outputs), end - at)
        chain.run(batch_of([(TOKENS[at:end], range(at, end), range(4))], outputs=wanted))
        parts.append(chain.stages[-1].normed(np.arange(end - at, dtype=np.int32)))
    chain.close()
    return np.concatenate(parts)


def bits(x: Float32) -> NDArray[np.uint32]:
    return x.view(np.uint32)


def test_chunks_cuts_and_outputs_change_no_bit(model: Model) -> None:
    whole = normed(all_threads(1), model, len(TOKENS))
    middle = model.layer_count // 2
    parts = [BackendLayers(all_threads(1), 0, middle), BackendLayers(all_threads(2), middle, model.layer_count)]
    for backend, cuts in ((all_threads(2), ()), (all_threads(1), (1,)), (MultiDeviceBackend(parts), ())):
        for chunk in (1, 7, len(TOKENS)):
            np.testing.assert_array_equal(bits(normed(backend, model, chunk, cuts, outputs=chunk % 3)), bits(whole))


def test_the_reference_agrees(model: Model) -> None:
    found, wanted = normed(all_threads(1), model, 9), normed(ReferenceBackend(), model, 9)
    assert found.std() > 0
    np.testing.assert_allclose(found, wanted, atol=0.05 * float(np.abs(wanted).max()))


def test_normed_rows_are_those_that_the_logits_are_made_of(model: Model) -> None:
    """The reference's products are exact up to one rounding."""
    chain = Chain(ReferenceBackend(), model)
    logits = chain.run(batch_of([(TOKENS, range(len(TOKENS)), range(4))]))
    rows = chain.stages[-1].normed(np.arange(len(TOKENS), dtype=np.int32)).astype(np.float64)
    tensors = model.file.tensors
    head = tensors["output.weight" if "output.weight" in tensors else "token_embd.weight"]
    weight = dequantize(head.quant_type, head.read(), head.rows * head.shape[-1]).reshape(head.shape)
    found = rows @ weight.astype(np.float64).T
    steps = model.program(0, model.layer_count).steps
    for cap in [step.cap for step in steps if isinstance(step, SoftCap)]:
        found = np.tanh(found / cap) * cap
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_some_rows_in_any_order_of_chunks(model: Model) -> None:
    chain = Chain(all_threads(1), model)
    chain.run(batch_of([(TOKENS, range(len(TOKENS)), range(4))], outputs=[3]))
    every = chain.stages[-1].normed(np.arange(len(TOKENS), dtype=np.int32))
    some = np.array([0, 2, 3, len(TOKENS) - 1], np.int32)
    np.testing.assert_array_equal(chain.stages[-1].normed(some), every[some])
    chain.close()
