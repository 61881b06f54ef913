"""Tests of one stage whose layers are on several backends: the programs of its parts, and equal bits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import combinations, pairwise
from weakref import ref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import PythonGatherer
from llamaclust.kernels.backend import Backend, Progress, kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend, MultiDeviceStage, layers_of
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import LIMITS, Chain, load_stage
from support.models.tiny_architectures import MODELS, TOKENS, build_architecture

MIXED = ("llama-experts", "gemma2", "gpt2", "falcon", "gemma4-inputs")


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    folder, models = tmp_path_factory.mktemp("chain"), dict[str, Model]()

    def open_once(name: str) -> Model:
        if name not in models:
            models[name] = Model.open(build_architecture(folder / f"{name}.gguf", name))
        return models[name]

    return open_once


def borders_of(model: Model) -> tuple[int, ...]:
    return model.costs(KvType.F16).borders


UNDIVIDED = ("gemma3n",)
"""Models that stay on one device of a worker, since their layers exchange more than one buffer."""


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNDIVIDED])
def test_layers_are_those_that_the_architecture_emits(open_model: Callable[[str], Model], name: str) -> None:
    model = open_model(name)
    whole, borders = model.program(0, model.layer_count), borders_of(model)
    for start, end in combinations(borders, 2):
        assert layers_of(whole, start, end) == model.program(start, end)
    rest = model.program(borders[1], model.layer_count)
    start, end = borders[1:3]
    assert layers_of(rest, start, end) == model.program(start, end)


@pytest.mark.parametrize("name", MIXED)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_chain_has_the_bits_of_one_stage(
    open_model: Callable[[str], Model], name: str, data: st.DataObject
) -> None:
    model = open_model(name)
    layers = model.layer_count
    bounds = [0, *sorted(data.draw(st.sets(st.sampled_from(borders_of(model)[1:-1]), min_size=1))), layers]
    backends = [all_threads(data.draw(st.integers(1, 2))) for _ in pairwise(bounds)]
    chain = MultiDeviceBackend([BackendLayers(one, *cut) for one, cut in zip(backends, pairwise(bounds), strict=True)])
    alone = all_threads(2)
    wanted, found = Chain(alone, model), Chain(chain, model)
    for stage, backend in ((wanted.stages[0], alone), (found.stages[0], chain)):
        program = model.program(0, layers)
        assert stage.kv_bytes == kv_bytes(program, LIMITS)
        assert stage.weight_bytes >= backend.held_bytes(program, model.tensors_for(program)) > 0
    assert found.stages[0].kv_bytes == wanted.stages[0].kv_bytes
    chunk = data.draw(st.sampled_from([1, 5, len(TOKENS)]))
    np.testing.assert_array_equal(found.logits(TOKENS, chunk).view(np.uint32), wanted.logits(TOKENS).view(np.uint32))
    found.close()
    wanted.close()


class _Full(CpuBackend):
    """A backend without free memory."""

    def load(
        self,
        program: Program,
        tensors: dict[str, Tensor],
        limits: StageLimits,
        progress: Progress,
        *,
        observed: bool = False,
    ) -> CpuStage:
        raise InsufficientMemoryError("full")


def test_what_was_loaded_is_freed_where_a_later_part_does_not_fit(open_model: Callable[[str], Model]) -> None:
    model, first = open_model("llama-experts"), CpuBackend(1)
    program = model.program(0, model.layer_count)
    chain: Backend = MultiDeviceBackend([BackendLayers(first, 0, 1), BackendLayers(_Full(1), 1, model.layer_count)])
    with pytest.raises(InsufficientMemoryError):
        load_stage(chain, model)
    assert first.held_bytes(program, model.tensors_for(program)) == 0


def test_a_closed_stage_is_freed_although_a_gatherer_refers_to_it(open_model: Callable[[str], Model]) -> None:
    model, backend = open_model("llama-experts"), CpuBackend(1)
    stage = load_stage(MultiDeviceBackend([BackendLayers(backend, 0, model.layer_count)]), model)
    assert isinstance(stage, MultiDeviceStage)
    stage.gather_by(PythonGatherer(lambda *_: None))
    held = ref(stage)
    stage.close()
    del stage
    gc.collect()
    assert held() is None
