"""Checks that stages on a processor, a GPU or both, in every combination of two and three, give the token ids and bits
of logprobs of one stage on a processor, in prefill and decode, with and without graphs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.backend import Backend, Float32, Stage
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.device import Device, Graph
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.sampling import Sampler
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import batch_of, load_stage
from support.models.tiny_model import build_tiny_model

LIMITS = StageLimits(max_batch_tokens=16, max_outputs=4, max_sequences=2, max_context_tokens=48, kv_blocks=4)
VOCABULARY, LAYERS = 320, 6
PROMPT = (5, 9, 17, 33, 65, 3, 7, 11, 201, 40, 12)
CHOICES = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, top_k=20))
STEPS = 4
KINDS = "cpu", "cuda", "mixed"
COMBINATIONS = [kinds for count in (2, 3) for kinds in product(KINDS, repeat=count) if set(kinds) != {"cpu"}]

Answer = list[tuple[int, bytes]]
Stages = Callable[[Sequence[str], bool], list[Stage]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("stages") / "tiny.gguf"
    small = {"hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 64, "vocabulary": VOCABULARY}
    build_tiny_model(path, layers=LAYERS, quant_type=QuantType.Q8_0, **small)  # type: ignore[arg-type]
    with Model.open(path) as model:
        yield model


@pytest.fixture(scope="module")
def stages(model: Model, device: Device) -> Iterator[Stages]:
    """Yields a function that loads equal stages on given devices, once each; sequences overwrite earlier ones."""
    cpu, loaded = CpuBackend(1), dict[tuple[str, int, int, bool], Stage]()
    gpus = {graphs: CudaBackend("cuda:0", device, 1, graphs=graphs) for graphs in (True, False)}

    def backend(kind: str, start: int, end: int, graphs: bool) -> Backend:
        if kind == "mixed":
            middle = (start + end) // 2
            return MultiDeviceBackend([BackendLayers(cpu, start, middle), BackendLayers(gpus[graphs], middle, end)])
        return cpu if kind == "cpu" else gpus[graphs]

    def stages_of(kinds: Sequence[str], graphs: bool) -> list[Stage]:
        found, size = [], LAYERS // len(kinds)
        for kind, (start, end) in zip(kinds, pairwise(range(0, LAYERS + 1, size)), strict=True):
            key = (kind, start, end, graphs)
            if key not in loaded:
                loaded[key] = load_stage(backend(*key), model, start, end, LIMITS)
            found.append(loaded[key])
        return found

    yield stages_of
    for stage in loaded.values():
        stage.close()


def answers(stages: Sequence[Stage]) -> Answer:
    """Returns tokens of a greedy and a sampled sequence: their prompts in two chunks, then decode steps of both."""
    sampler, tables = Sampler(VOCABULARY), ((2, 0), (1, 3))
    rows = [list(PROMPT), [*reversed(PROMPT)]]
    found: Answer = []

    def run(parts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], outputs: Sequence[int]) -> Float32:
        hidden: Float32 | None = None
        for stage in stages:
            hidden = stage.run(batch_of(parts, outputs=outputs), hidden)
        assert hidden is not None
        return hidden

    def choose(logits: Float32, first: int) -> None:
        tasks = [SampleTask(CHOICES[first + n], 3, 0, len(rows[first + n])) for n in range(len(logits))]
        for n, row in enumerate(sampler.run(logits, tuple(tasks))):
            rows[first + n].append(row.token)
            found.append((row.token, struct.pack("<f", row.logprob)))

    for n, table in enumerate(tables):
        run([(rows[n][:7], range(7), table)], [])
        choose(run([(rows[n][7:], range(7, len(PROMPT)), table)], [len(PROMPT) - 8]), n)
    for position in range(len(PROMPT), len(PROMPT) + STEPS):
        parts = [(row[position:], [position], table) for row, table in zip(rows, tables, strict=True)]
        choose(run(parts, [0, 1]), 0)
    return found


@pytest.fixture(scope="module")
def wanted(stages: Stages) -> Answer:
    return answers(stages(["cpu"], False))


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_stages_anywhere_give_the_same_ids_and_logprobs(
    stages: Stages, wanted: Answer, kinds: Sequence[str], graphs: bool
) -> None:
    assert answers(stages(kinds, graphs)) == wanted
    assert len(wanted) == 2 * (1 + STEPS) and len({token for token, _ in wanted}) > 3


def test_with_graphs_steps_are_replayed(
    stages: Stages, wanted: Answer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that the stages capture graphs, which the tests above rely on."""
    captured, capture = list[Graph](), device.capture

    def counted(work: Callable[[], None]) -> Graph:
        captured.append(capture(work))
        return captured[-1]

    monkeypatch.setattr(device, "capture", counted)
    assert answers(stages(["cuda"], False)) == wanted and not captured
    assert answers(stages(["cuda"], True)) == wanted and len(captured) == 3, "both kinds of chunk, and steps"
    assert answers(stages(["mixed"], True)) == wanted and len(captured) == 6
