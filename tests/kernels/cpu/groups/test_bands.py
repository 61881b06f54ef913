"""Tests of large batches in a group: rows are computed in bands, and one band's gathers overlap with the computation of
others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import LinkError, PythonGatherer
from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.gathers import LEAST_BANDED_ROWS, LEAST_ROWS_OF_BAND, MOST_BANDS, band_borders
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Gather, Program
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import LIMITS, batch_of
from support.arithmetic.members import CpuGroup, LinkedGroup
from support.models.tiny_architectures import MODELS, TOKENS, build_architecture
from support.seed import SEED

REFUSED = {"gemma3n", "gemma4-inputs"}  # models with layers that share KV
MANY = replace(LIMITS, max_batch_tokens=320, max_outputs=320)
LEAST = LEAST_BANDED_ROWS
TWO = ("qwen3", "lfm2")


def tokens(count: int) -> list[int]:
    return (TOKENS * (count // len(TOKENS) + 1))[:count]


def batches() -> Iterator[Batch]:
    """Yields a prompt, its next rows with another prompt, several sequences of which one is in both bands, and a single
    row."""
    yield batch_of([(tokens(300), range(300), range(20))])
    yield batch_of([(tokens(140), range(300, 440), range(32)), (tokens(120), range(120), range(32, 40))])
    prompts = [(tokens(90), range(90), range(40 + 6 * place, 46 + 6 * place)) for place in range(3)]
    yield batch_of(prompts, outputs=[0, 134, 135, 269])
    yield batch_of([([5], [440], range(32))])


def whole(model: Model, layers: tuple[int, int] | None = None) -> Program:
    return model.program(*(layers or (0, model.layer_count)), KvType.F16, MANY.max_context_tokens, 1)


def load(model: Model, program: Program, threads: int = 1, limits: StageLimits = MANY) -> CpuStage:
    backend = CpuBackend(threads, yields=False)
    return backend.load(program, model.tensors_for(program), limits, lambda done_bytes: None)


def results(stage: CpuStage) -> list[Float32]:
    return [stage.run(batch, None).copy() for batch in batches()]


@pytest.mark.parametrize("name", sorted(MODELS.keys() - REFUSED))
def test_bands_have_the_bits_of_one(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name, QuantType.Q8_0)) as model:
        program = whole(model)
        expected = results(load(model, program))
        group = CpuGroup(model, program, (1.0, 1.0), 1, MANY)
        for batch, logits in zip(batches(), expected, strict=True):
            assert group.run(batch, None)[0].tobytes() == logits.tobytes()


@pytest.mark.parametrize(("threads", "bands"), [(1, 2), (3, 2), (2, 4), (2, 1)])
@pytest.mark.parametrize("name", TWO)
def test_bands_over_links(tmp_path: Path, name: str, threads: int, bands: int) -> None:
    """The second of two stages gets hidden states; layers with states compute all rows together."""
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        expected = results(load(model, whole(model)))
        programs = [whole(model, layers) for layers in ((0, 1), (1, model.layer_count))]
        first, second = (LinkedGroup(model, each, (2.0, 1.0, 1.0), threads, MANY) for each in programs)
        for links in (*first.links, *second.links):
            links.bands = bands
        for batch, logits in zip(batches(), expected, strict=True):
            hidden, *others = first.run(batch, None)
            assert all(other.tobytes() == hidden.tobytes() for other in others)
            assert second.run(batch, hidden)[0].tobytes() == logits.tobytes()


@pytest.mark.parametrize(
    ("rows", "most", "borders"),
    [
        (LEAST - 1, 4, [0, LEAST - 1]),
        (LEAST, 2, [0, 32, LEAST]),
        (LEAST, 4, [0, 32, LEAST]),
        (100, 3, [0, 32, 64, 100]),
        (500, 1, [0, 500]),
        (500, 3, [0, 128, 320, 500]),
        (512, 4, [0, 96, 240, 368, 512]),
    ],
)
def test_runs_that_have_bands(tmp_path: Path, rows: int, most: int, borders: list[int]) -> None:
    """Each gather of a layer is done once per band; logits are gathered once."""
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        program, limits = divide(whole(model), (1.0, 1.0), 0), replace(MANY, max_batch_tokens=512)
        stage = load(model, program, limits=limits)
    seen = list[tuple[int, int]]()
    gatherer = PythonGatherer(lambda number, own, whole: seen.append((number, len(own))))
    stage.gather_by(gatherer)
    gatherer.bands = most
    stage.run(batch_of([(tokens(rows), range(rows), range(32))], outputs=[0]), None)
    layers = sum(isinstance(step, Gather) for step in program.steps) - 1
    assert band_borders(program, rows, most) == borders
    bands = [end - begin for begin, end in pairwise(borders)]
    assert seen == [*enumerate(bands * layers), (len(bands) * layers, 1)]


def test_native_bands_are_those_that_other_members_count(tmp_path: Path) -> None:
    """C++ and `kernels/gathers.py` have separate copies of the limits."""
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        program = divide(whole(model), (1.0, 1.0), 0)
        stage = load(model, program)
    bands = list[int]()
    gatherer = PythonGatherer(lambda number, own, whole: bands.append(len(own)))
    stage.gather_by(gatherer)
    print(f"seed {SEED}")
    limits = (LEAST_BANDED_ROWS, 3 * LEAST_ROWS_OF_BAND, MOST_BANDS * LEAST_ROWS_OF_BAND)
    drawn = random.Random(SEED).sample(range(1, MANY.max_batch_tokens), 4)
    for rows in (*drawn, *(limit - less for limit in limits for less in (0, 1))):
        for most in range(1, MOST_BANDS + 1):
            gatherer.bands = most
            bands.clear()
            stage.run(batch_of([(tokens(rows), range(rows), range(32))], outputs=[0]), None)
            borders = band_borders(program, rows, most)
            assert bands[: len(borders) - 1] == [end - begin for begin, end in pairwise(borders)], (rows, most)


def test_a_group_has_one_to_four_bands() -> None:
    gatherer = PythonGatherer(print)
    assert gatherer.bands == 2
    for wrong in (0, MOST_BANDS + 1, -1):
        with pytest.raises(ValueError, match=f"bands must be 1 to {MOST_BANDS}"):
            gatherer.bands = wrong


@pytest.mark.parametrize("threads", [1, 3])
def test_a_gather_that_fails_ends_the_run(tmp_path: Path, threads: int) -> None:
    print(f"seed {SEED}")
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        program = divide(whole(model), (1.0, 1.0), 0)
        stage = load(model, program, threads)
    places = 2 * sum(isinstance(step, Gather) for step in program.steps) - 1
    fails_at, seen = -1, list[int]()

    def gather(number: int, own: Float32, whole: Float32) -> None:
        seen.append(number)
        whole[:] = 0
        if number == fails_at:
            raise ConnectionError(f"member 1 is silent at {number}")

    stage.gather_by(PythonGatherer(gather))
    batch = batch_of([(tokens(300), range(300), range(20))])
    expected = stage.run(batch, None).tobytes()
    assert seen == [*range(places)]
    order = random.Random(SEED).sample([*range(places)] * 4, 4 * places)
    for fails_at in order:
        seen.clear()
        with pytest.raises(ConnectionError, match=f"silent at {fails_at}$"):
            stage.run(batch, None)
        assert seen[: fails_at + 1] == [*range(fails_at + 1)] and len(seen) <= fails_at + 2
    fails_at = -1
    assert stage.run(batch, None).tobytes() == expected


def test_a_peer_that_goes_ends_the_run(tmp_path: Path) -> None:
    """Any gather in progress may detect the loss."""
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        group = LinkedGroup(model, whole(model), (1.0, 1.0), 2, MANY)
    batch = batch_of([(tokens(300), range(300), range(20))])
    group.run(batch, None)
    group.links[1].close()
    group.links[0].begin(1, 7)
    for _ in range(2):
        with pytest.raises(LinkError, match="worker 1") as raised:
            group.stages[0].run(batch, None)
        assert (raised.value.place, raised.value.kind) == (1, "closed")
