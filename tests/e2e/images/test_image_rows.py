"""Tests of requests with image rows: token ids and logprob bits do not depend on the cluster."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.scheduler.capacity import Capacity
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.kernels.backend import Backend
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.model.program import GivenRows, Scale
from llamaclust.wire.microbatch.messages import Microbatch, SamplingInputs
from llamaclust.worker.stage.stage_runner import StageRunner
from support.clusters.fakes import FakeModel, FakeStages, Simulation, linear
from support.models.tiny_architectures import build_architecture
from support.plans.drafting import AnyChains, AnyWindows, SaidDrafters, replayed
from support.plans.image_requests import with_pictures

BACKENDS: dict[str, Backend] = {"reference": ReferenceBackend(), "cpu": CpuBackend(1)}
CONTEXT, TOKENS, SEED = 160, 12, 5
KINDS = {"llama-linear": "plain", "gemma3": "bidirectional", "qwen3vl": "turned"}
SEEDED = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)


class ComputingModel(FakeModel):
    """Computes the stages of a real model in this process."""

    def __init__(self, model: Model, backend: Backend, cut: Sequence[int], limits: StageLimits) -> None:
        super().__init__(limits.kv_blocks)
        self._runners = [StageRunner(backend, model, *layers, limits) for layers in pairwise(cut)]

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        hidden = None
        for runner in self._runners:
            hidden = runner.run(microbatch, hidden)
        assert hidden is not None
        return self._runners[-1].finish(hidden, inputs)

    def embeddings(self, microbatch: Microbatch) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute the same requests."""

    cut: tuple[int, ...]
    prefill_chunk: int = 512
    together: bool = False
    twice: bool = False  # Requests are sent again, and the answers with cached prompts count.
    kv_blocks: int = 400
    preempted: bool = False  # The second request takes the turn of the third one, which has the first one's owner.
    drafted: bool = False
    steps_before_loss: int | None = None  # All stages are lost once, after this number of results.


@cache
def opened(folder: Path, name: str) -> Model:
    return Model.open(build_architecture(folder / f"{name}.gguf", name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Run:
    """Sends requests to a scheduler whose stages compute a real model."""

    def __init__(self, model: Model, backend: Backend, way: Way, texts: Sequence[list[int]]) -> None:
        chosen = Capacity(
            context_length=CONTEXT, max_sequences=4, max_outputs=64, rows=96, prefill_chunk=way.prefill_chunk
        )
        blocks = chosen.blocks(model, way.kv_blocks)
        self._settings = chosen.scheduler_settings(model, blocks)
        if way.drafted:
            says = replayed(texts, 0.8, random.Random(SEED), self._settings.vocabulary)
            self._settings = replace(self._settings, speculation=SpeculationSettings(SaidDrafters(says)))
        self._made = model, backend, way.cut, chosen.stage_limits(blocks)
        self._way = way
        self._simulation = Simulation(Scheduler(self._settings, 1, len(way.cut) - 1), self._stages())

    def _stages(self) -> FakeStages:
        return FakeStages(ComputingModel(*self._made), [linear(100, 10)] * (len(self._way.cut) - 1))

    def answers(self, requests: Sequence[GenerationRequest]) -> list[list[RowResult]]:
        source, scheduler = random.Random(SEED), self._simulation.scheduler
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speculation, "best_windows", AnyWindows(source, 6))
            patch.setattr(speculation, "best_chain", AnyChains(source, 3))
            found = self._answers(requests)
            if self._way.twice:
                before = scheduler.counts.cached_tokens
                found = self._answers(requests)
                assert scheduler.counts.cached_tokens > before, "no prompt was cached"
        assert scheduler.counts.preemptions > 0 or not self._way.preempted, "none was preempted"
        assert scheduler.drafts.drafted > 0 or not self._way.drafted, "no token was drafted"
        return found

    def _answers(self, requests: Sequence[GenerationRequest]) -> list[list[RowResult]]:
        run, keys = self._simulation, list[int]()
        if self._way.preempted:
            first, second, third = requests
            keys = [run.add(replace(request, owner="a")) for request in (first, third)]
            while not all(map(run.rows, keys)):
                run.step()
            keys.insert(1, run.add(replace(second, owner="b")))
        for request in requests[len(keys) :]:
            keys.append(run.add(request))
            if not self._way.together:
                self._finish()
        self._finish()
        return [run.rows(key) for key in keys]

    def _finish(self) -> None:
        run = self._simulation
        for _ in range(self._way.steps_before_loss or 0):
            run.step()
        if self._way.steps_before_loss is not None:
            run.send_all()
            run.sent.clear()
            run.stages = self._stages()
            run.scheduler.restart(self._settings, run.scheduler.in_flight.epoch + 1, len(self._way.cut) - 1)
        run.finish()


def embedded(model: Model, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Returns the first stage's rows [tokens, levels * embedding] for these tokens, with zeros for other levels."""
    program = model.program(0, 1)
    given = next(index for index, step in enumerate(program.steps) if isinstance(step, GivenRows))
    table = np.frombuffer(model.file.tensor("token_embd.weight").read(), np.float32)
    rows = table.reshape(-1, model.hyperparameters.embedding_length)[list(tokens)]
    for step in program.steps[:given]:
        rows = rows * np.float32(step.factor) if isinstance(step, Scale) else rows
    return np.pad(rows, ((0, 0), (0, model.image_width - rows.shape[1])))


def pictures(model: Model, kind: str) -> list[ImageSpan]:
    """Returns images with random rows whose values are about as large as embeddings."""
    source = np.random.default_rng(SEED)
    scale = float(np.abs(embedded(model, range(9))).mean())
    found = []
    for rows in (40, 7, 24):
        values = (scale * source.standard_normal((rows, model.image_width))).astype(np.float32)
        places = np.arange(rows)
        turned = np.stack([0 * places, places // 4, places % 4, 0 * places])[: model.rope_sections].astype(np.int32)
        found.append(
            ImageSpan(
                0, rows, values, bytes([rows]) * 32, kind == "bidirectional", turned if kind == "turned" else None
            )
        )
    return found


def requests_of(model: Model, kind: str) -> list[GenerationRequest]:
    source, shown = random.Random(SEED), pictures(model, kind)
    print(f"seed {SEED}")

    def text(length: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, model.hyperparameters.vocabulary_size) for _ in range(length))

    first = with_pictures(GenerationRequest("one", text(20), TOKENS), [(3, shown[0])])
    second = with_pictures(
        GenerationRequest("two", text(25), TOKENS, SEEDED, 7), [(0, shown[2]), (2, shown[1]), (2, shown[0])]
    )
    return [first, second, replace(first, prompt=(*first.prompt[:50], *text(30)), seed=3, params=SEEDED)]


WAYS = {
    "two stages": Way((0, 1, 3), prefill_chunk=9),
    "three stages": Way((0, 1, 2, 3), prefill_chunk=33, together=True),
    "cached": Way((0, 3), together=True, twice=True, prefill_chunk=16),
    "preempted": Way((0, 2, 3), kv_blocks=14, preempted=True, prefill_chunk=20),
    "drafted": Way((0, 1, 3), drafted=True),
    "lost": Way((0, 1, 3), steps_before_loss=3, together=True, prefill_chunk=16),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_answers_to_pictures_are_the_same_whatever_the_way(folder: Path, name: str, backend: str) -> None:
    model = opened(folder, name)
    requests = requests_of(model, KINDS[name])
    whole = Run(model, BACKENDS[backend], Way((0, model.layer_count)), ()).answers(requests)
    texts = [[*request.prompt, *(row.token for row in rows)] for request, rows in zip(requests, whole, strict=True)]
    for what, way in WAYS.items():
        ended = replace(way, cut=(*way.cut[:-1], model.layer_count))
        assert Run(model, BACKENDS[backend], ended, texts).answers(requests) == whole, what
    blind = [replace(request, images=()) for request in requests]
    assert Run(model, BACKENDS[backend], Way((0, model.layer_count)), ()).answers(blind) != whole, (
        "pictures are not seen"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama-linear", "gemma3", "qwen3vl"])
def test_rows_equal_to_embeddings_give_the_answers_of_the_tokens(folder: Path, name: str, backend: str) -> None:
    model = opened(folder, name)
    tokens = tuple(3 + 7 * index % 200 for index in range(60))
    spans = [
        ImageSpan(start, end, embedded(model, tokens[start:end]), bytes([start]) * 32)
        for start, end in ((4, 30), (35, 50))
    ]
    prompt = list(tokens)
    for span in spans:
        prompt[span.start : span.end] = [0] * (span.end - span.start)
    asked = (
        GenerationRequest("tokens", tokens, TOKENS),
        GenerationRequest("rows", tuple(prompt), TOKENS, images=tuple(spans)),
    )
    of_tokens, of_rows = Run(model, BACKENDS[backend], Way((0, 1, model.layer_count), prefill_chunk=20), ()).answers(
        asked
    )
    assert of_rows == of_tokens
