"""Tests of groups on CPUs: the members together give one stage's bits, in every architecture family."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Plan, PythonGatherer
from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Gather, Program
from support.arithmetic.batches import LIMITS, batch_of
from support.arithmetic.members import CpuGroup, LinkedGroup, run_in_processes
from support.models.tiny_architectures import DECODED_TOKENS, MODELS, TOKENS, build_architecture

SHARES = (1.0, 1.0), (1.0, 2.0, 1.0)
SOME = ("qwen3", "gemma3", "gpt-oss", "deepseek2", "phi3-short", "baichuan-13b", "lfm2")


def batches() -> Iterator[Batch]:
    """Yields a prompt, its next tokens, two sequences in decode, and both beside a prompt without outputs."""
    many = len(TOKENS)
    yield batch_of([(TOKENS, range(many), range(4))])
    for at, token in enumerate(DECODED_TOKENS[:2], many):
        yield batch_of([([token], [at], range(4))])
    yield batch_of([(TOKENS[:18], range(18), range(4, 8))], outputs=[])
    yield batch_of([([11], [many + 2], range(4)), ([4], [18], range(4, 8))])
    wanted = [0, 1, 21]
    rows = [([7], [many + 3], range(4)), ([9], [19], range(4, 8)), (TOKENS[:20], range(20), range(8, 12))]
    yield batch_of(rows, outputs=wanted)


def load(model: Model, program: Program, limits: StageLimits = LIMITS) -> CpuStage:
    return CpuBackend(1).load(program, model.tensors_for(program), limits, lambda done_bytes: None)


def whole(model: Model, kv_type: KvType = KvType.F16) -> Program:
    return model.program(0, model.layer_count, kv_type, LIMITS.max_context_tokens, 1)


def results(stage: CpuStage) -> list[Float32]:
    return [stage.run(batch, None).copy() for batch in batches()]


def assert_bits(group: CpuGroup, expected: list[Float32]) -> None:
    """Checks the leader's logits."""
    for batch, logits in zip(batches(), expected, strict=True):
        assert group.run(batch, None)[0].tobytes() == logits.tobytes()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_members_have_the_bits_of_one(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model)
        expected = results(load(model, program))
        group = CpuGroup(model, program, SHARES[0], 1)
        assert_bits(group, expected)
        assert len({*group.meeting.gathers}) == 1 and group.meeting.gathers[0] > 0
        assert_bits(LinkedGroup(model, program, SHARES[1], 2), expected)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "lfm2"])
def test_members_in_processes(tmp_path: Path, name: str, shares: tuple[float, ...]) -> None:
    path = build_architecture(tmp_path / "model.gguf", name)
    with Model.open(path) as model:
        expected = [logits.tobytes() for logits in results(load(model, whole(model)))]
    assert run_in_processes(path, shares, [*batches()])[0] == expected


@pytest.mark.parametrize("kv_type", [KvType.Q8_0, KvType.INT8])
@pytest.mark.parametrize("name", SOME)
def test_kv_types(tmp_path: Path, name: str, kv_type: KvType) -> None:
    limits = replace(LIMITS, kv_type=kv_type.value)
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        program = whole(model, kv_type)
        expected = results(load(model, program, limits))
        assert_bits(CpuGroup(model, program, (2.0, 1.0), 2, limits), expected)


@pytest.mark.parametrize("name", SOME)
def test_stages_of_groups(tmp_path: Path, name: str) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        expected = results(load(model, whole(model)))
        bounds = (0, 1), (1, model.layer_count)
        programs = [model.program(*each, KvType.F16, LIMITS.max_context_tokens, 1) for each in bounds]
        first, second = (CpuGroup(model, program, (1.0, 1.0), 2) for program in programs)
        for batch, logits in zip(batches(), expected, strict=True):
            hidden, same = first.run(batch, None)
            assert hidden.tobytes() == same.tobytes()
            assert second.run(batch, hidden)[0].tobytes() == logits.tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_gather_that_fails_ends_the_run_at_any_place(tmp_path: Path, threads: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        program = divide(whole(model), (1.0, 1.0), 0)
        tensors = model.tensors_for(program)
        stage = CpuBackend(threads, yields=False).load(program, tensors, LIMITS, lambda done_bytes: None)
    count = sum(isinstance(step, Gather) for step in program.steps)
    fails_at, seen = -1, list[int]()

    def gather(number: int, own: Float32, whole: Float32) -> None:
        seen.append(number)
        whole[:] = 0
        if number == fails_at:
            raise ConnectionError(f"member 1 is silent at {number}")

    stage.gather_by(PythonGatherer(gather))
    batch = [batch_of([(TOKENS[:rows], range(rows), range(4))]) for rows in (1, 3, 24)]
    expected = [stage.run(each, None).tobytes() for each in batch]
    places = [*range(count)] * 3
    random.Random(seed).shuffle(places)
    for at, fails_at in enumerate(places):
        seen.clear()
        with pytest.raises(ConnectionError, match=f"silent at {fails_at}"):
            stage.run(batch[at % 3], None)
        assert seen == [*range(fails_at + 1)]
    fails_at = -1
    assert [stage.run(each, None).tobytes() for each in batch] == expected


def test_a_member_without_a_gatherer_does_not_run(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "model.gguf", "qwen3")) as model:
        stage = load(model, divide(whole(model), (1.0, 1.0), 0))
    with pytest.raises(ValueError, match="given no gatherer"):
        stage.run(next(batches()), None)


@pytest.mark.parametrize(
    ("own", "borders", "words"),
    [
        (32, [0, 64], "as many columns as those of a member"),
        (32, [0, 32], "as many columns as those of a member, and of all"),
        (32, [0], "one after the other"),
        (32, [0, 48, 32, 64], "one after the other"),
        (32, [32, 64], "one after the other"),
        (0, [0, 32, 64], "as many columns as those of a member"),
        (64, [0, 32, 32, 64], "as many columns as those of a member"),
        (0, [0, 32, 32, 48], "as many columns as those of a member, and of all"),
    ],
)
def test_borders_that_do_not_fit_are_refused(own: int, borders: list[int], words: str) -> None:
    """Members may have zero columns."""
    plan = Plan(4, 4, 1, 16, 1)
    x, out = (plan.add_buffer(width, 1, False, 4) if width else None for width in (own, 64))
    assert out is not None
    with pytest.raises(ValueError, match=words):
        plan.gather(x, out, borders)
    plan.gather(x, out, [0, own, own, 64])


def test_what_each_thread_has_for_itself_is_not_gathered() -> None:
    plan = Plan(4, 4, 1, 16, 1)
    x, out = plan.add_buffer(32, 1, True, 4), plan.add_buffer(64, 1, False, 4)
    with pytest.raises(ValueError, match="lines that all threads share"):
        plan.gather(x, out, [0, 32, 64])


def test_lines_are_gathered_into_as_many() -> None:
    plan = Plan(4, 4, 1, 16, 1)
    x, out = plan.add_buffer(32, 3, False, 4), plan.add_buffer(64, 2, False, 4)
    with pytest.raises(ValueError, match="lines that all threads share"):
        plan.gather(x, out, [0, 32, 64])
