"""Checks that group members on GPUs, with others on GPUs or processors, give the bits of an undivided stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import PythonGatherer
from llamaclust.kernels.backend import Backend, Batch, Float32, GathersRows, RanksLogits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.executor.gathers import pack, unpack
from llamaclust.kernels.cuda.runtime.device import Device, Graph
from llamaclust.kernels.gathers import packed_width
from llamaclust.kernels.multi_device import BackendLayers, MultiDeviceBackend
from llamaclust.kernels.sampling import Sampler
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Gather, Program
from llamaclust.model.quant_types import ActivationFormat
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.arithmetic.batches import batch_of
from support.arithmetic.linked import begin, linked
from support.arithmetic.members import Group
from support.arithmetic.sampling_cases import random_task
from support.cuda.stages import LIMITS, Open, random_tokens
from support.seed import SEED
from support.wire.frame_reader import build_batch
from support.wire.trust import authority

FAMILIES = ("llama", "gemma2", "gpt2", "qwen3", "cohere2", "mistral3", "gemma4", "granite")
KINDS = ("gg", "gc", "cg", "mg", "cm")  # per member: g for a GPU, c for a processor, m for several devices


class Backends:
    """A backend for each kind of member."""

    def __init__(self, cuda: CudaBackend, layers: int) -> None:
        self._cuda, self._layers = cuda, layers

    def of(self, kinds: str) -> list[Backend]:
        return [self._one(kind) for kind in kinds]

    def _one(self, kind: str) -> Backend:
        if kind == "g":
            return self._cuda
        cpu = CpuBackend(1, yields=False)
        if kind == "c":
            return cpu
        return MultiDeviceBackend([BackendLayers(cpu, 0, 1), BackendLayers(self._cuda, 1, self._layers)])


def whole(model: Model, limits: StageLimits = LIMITS) -> Program:
    return model.program(0, model.layer_count, KvType(limits.kv_type), limits.max_context_tokens, 1)


def batches(model: Model) -> Iterator[Batch]:
    """Yields prompts with and without outputs, single tokens, and microbatches of two and three sequences."""
    tokens, tables = random_tokens(model, 24), [[9, 4], [1, 2], [0, 5]]
    yield batch_of([(tokens[:17], range(17), tables[0])])
    yield batch_of([(tokens[17:18], [17], tables[0])])
    yield batch_of([(tokens[18:19], [18], tables[0])])
    yield batch_of([(tokens[:9], range(9), tables[1])], outputs=[])
    yield batch_of([(tokens[19:20], [19], tables[0]), (tokens[:9], range(9), tables[2])], outputs=[0, 9])
    for at in (0, 1, 2):
        rows = [(tokens[at : at + 1], [place + at], table) for place, table in zip((20, 9, 9), tables, strict=True)]
        yield batch_of(rows)


def logits_of(backend: Backend, model: Model, limits: StageLimits = LIMITS) -> list[Float32]:
    program = whole(model, limits)
    stage = backend.load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    found = [stage.run(batch, None).copy() for batch in batches(model)]
    stage.close()
    return found


def assert_bits(group: Group, model: Model, expected: list[Float32]) -> None:
    for number, (batch, logits) in enumerate(zip(batches(model), expected, strict=True)):
        found = group.run(batch, None)[0]
        assert found.tobytes() == logits.tobytes(), f"microbatch {number}"


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_members_have_the_bits_of_one(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str, kinds: str) -> None:
    model = opened(name)
    shares = (1.0, 1.0) if kinds == "gg" else (2.0, 1.0)
    group = Group(model, whole(model), shares, Backends(cuda, model.layer_count).of(kinds), LIMITS)
    assert_bits(group, model, logits_of(cpu, model))
    assert len({*group.meeting.gathers}) == 1 and group.meeting.gathers[0] > 0
    group.close()


@pytest.mark.parametrize("kinds", ["gg", "gc", "mg"])
@pytest.mark.parametrize(("name", "kv_type"), [("qwen3", KvType.Q8_0), ("llama", KvType.INT8), ("gemma2", KvType.Q8_0)])
def test_kv_types(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str, kv_type: KvType, kinds: str) -> None:
    model, limits = opened(name), replace(LIMITS, kv_type=kv_type.value)
    group = Group(model, whole(model, limits), (1.0, 1.0), Backends(cuda, model.layer_count).of(kinds), limits)
    assert_bits(group, model, logits_of(cpu, model, limits))
    group.close()


@pytest.mark.parametrize("kinds", ["gg", "cg", "gm"])
@pytest.mark.parametrize("name", ["gemma2", "gemma4", "gpt2"])
def test_window_blocks_and_stages_of_groups(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str, kinds: str
) -> None:
    """Blocks behind the window are released and overwritten; the first layer is a stage of one worker."""
    model = opened(name)
    window = model.window
    limits = replace(LIMITS, max_context_tokens=96, kv_blocks=6, window_blocks=0 if window is None else 4)
    steps, program = list(windowed(model, limits)), whole(model, limits)
    alone = cpu.load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    bounds = (0, 1), (1, model.layer_count)
    kv_type = KvType(limits.kv_type)
    first, rest = (model.program(*each, kv_type, limits.max_context_tokens, 1) for each in bounds)
    before = cpu.load(first, model.tensors_for(first), limits, lambda done_bytes: None)
    backends: list[Backend] = Backends(cuda, model.layer_count).of(kinds.replace("m", "g"))
    group = Group(model, rest, (1.0, 2.0), backends, limits)
    for step in steps:
        expected = alone.run(step, None).copy()
        assert group.run(step, before.run(step, None).copy())[0].tobytes() == expected.tobytes()
    group.close()


def windowed(model: Model, limits: StageLimits) -> Iterator[Batch]:
    tokens, window = random_tokens(model, 90), model.window
    for at in range(0, 90, 30):
        ring: tuple[int, ...] = ()
        first = 0
        if window is not None:
            first, end = max(0, at - window + 1) // 16, -(-(at + 30) // 16)
            ring = tuple(number for block in range(first, end) for number in (block % 4, 1))
        chunk = Chunk(tuple(tokens[at : at + 30]), at, (0, 6), 30, None, ring, first)
        yield build_batch(Microbatch("m", 1, 0, (chunk,)), limits, model.hyperparameters.vocabulary_size, window)


def test_graphs_of_segments(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches between two gathers become a graph at the second use of a shape; `graphs=False` captures none."""
    model, captured, capture = opened("qwen3"), list[Graph](), device.capture

    def counted(work: Callable[[], None]) -> Graph:
        captured.append(capture(work))
        return captured[-1]

    monkeypatch.setattr(device, "capture", counted)
    expected = logits_of(cpu, model)
    group = Group(model, whole(model), (1.0, 1.0), [cuda, CpuBackend(1)], LIMITS)
    gathers = sum(isinstance(step, Gather) for step in divide(whole(model), (1.0, 1.0), 0).steps)
    assert_bits(group, model, expected)
    assert len(captured) == 2 * (gathers + 1), "one row, and three of as many sequences, came again"
    group.close()
    plain = CudaBackend("cuda:0", device, 1, graphs=False)
    group = Group(model, whole(model), (1.0, 1.0), [plain, CpuBackend(1)], LIMITS)
    assert_bits(group, model, expected)
    assert len(captured) == 2 * (gathers + 1)
    group.close()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_a_leader_on_a_gpu_samples(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """The GPU ranks gathered logits, and sampled tokens equal those from the logits of an undivided stage."""
    model, random = opened(name), np.random.default_rng(SEED)
    vocabulary = model.hyperparameters.vocabulary_size
    sampler = Sampler(vocabulary)
    group = Group(model, whole(model), (1.0, 1.0), [cuda, CpuBackend(1)], LIMITS)
    leader, follower = group.stages
    assert isinstance(leader, RanksLogits) and leader.ranks_logits
    for batch, logits in zip(batches(model), logits_of(cpu, model), strict=True):
        with ThreadPoolExecutor(1) as pool:
            followed = pool.submit(follower.run, batch, None)
            ranked = leader.run_ranked(batch, None)
            followed.result()
        tasks = tuple(random_task(random, vocabulary) for _ in logits)
        assert sampler.run(ranked, tasks) == sampler.run(logits, tasks)
        if len(logits) > 0:
            assert ranked.rows(range(len(logits))).tobytes() == logits.tobytes()
    group.close()


@pytest.mark.parametrize("kinds", KINDS)
def test_links_with_tls(tmp_path: Path, opened: Open, cpu: CpuBackend, cuda: CudaBackend, kinds: str) -> None:
    model = opened("qwen3")
    expected = logits_of(cpu, model)
    group = Group(model, whole(model), (2.0, 1.0), Backends(cuda, model.layer_count).of(kinds), LIMITS)
    links = linked(2, trust=authority(tmp_path))
    for stage, ends in zip(group.stages, links, strict=True):
        assert isinstance(stage, GathersRows)
        stage.gather_by(ends)
    for step, (batch, logits) in enumerate(zip(batches(model), expected, strict=True)):
        begin(links, step)
        assert group.run(batch, None)[0].tobytes() == logits.tobytes()
    group.close()


@pytest.mark.parametrize("kind", ["g", "m", "c"])
def test_a_gather_that_fails_ends_the_run_at_any_place(opened: Open, cuda: CudaBackend, kind: str) -> None:
    """The run after a failure gives the expected bits, and gathers have the numbers of the whole stage."""
    model = opened("qwen3")
    program = divide(whole(model), (1.0, 1.0), 0)
    (backend,) = Backends(cuda, model.layer_count).of(kind)
    stage = backend.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    count = sum(isinstance(step, Gather) for step in program.steps)
    fails_at, seen = -1, list[int]()

    def gather(number: int, own: Float32, whole: Float32) -> None:
        seen.append(number)
        whole[:] = 0
        if number == fails_at:
            raise ConnectionError(f"member 1 is silent at {number}")

    assert isinstance(stage, GathersRows)
    stage.gather_by(PythonGatherer(gather))
    batch = next(batches(model))
    expected = stage.run(batch, None).tobytes()
    for fails_at in range(count):
        seen.clear()
        with pytest.raises(ConnectionError, match=f"silent at {fails_at}"):
            stage.run(batch, None)
        assert seen == [*range(fails_at + 1)]
    fails_at = -1
    assert stage.run(batch, None).tobytes() == expected
    stage.close()


def test_a_member_without_a_gatherer_does_not_run(opened: Open, cuda: CudaBackend) -> None:
    model = opened("qwen3")
    program = divide(whole(model), (1.0, 1.0), 0)
    stage = cuda.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    with pytest.raises(ValueError, match="this member of a group has no gatherer"):
        stage.run(next(batches(model)), None)
    stage.close()


@pytest.mark.parametrize(("rows", "kinds"), [(255, "gc"), (256, "cg"), (301, "mg")])
def test_bands_of_rows(opened: Open, cpu: CpuBackend, cuda: CudaBackend, rows: int, kinds: str) -> None:
    """Members on GPUs gather many rows in two pieces, like members on processors."""
    model = opened("llama")
    limits = replace(LIMITS, max_batch_tokens=320, max_outputs=4, max_context_tokens=320)
    program, tokens = whole(model, limits), random_tokens(model, rows)
    batch = batch_of(
        [(tokens[:200], range(200), range(13)), (tokens[200:], range(rows - 200), range(13, 21))], outputs=[3]
    )
    alone = cpu.load(program, model.tensors_for(program), limits, lambda done_bytes: None)
    group = Group(model, program, (1.0, 1.0), Backends(cuda, model.layer_count).of(kinds), limits)
    assert group.run(batch, None)[0].tobytes() == alone.run(batch, None).tobytes()
    group.close()


@pytest.mark.parametrize("form", [ActivationFormat.Q8_32, ActivationFormat.Q8_256])
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 127.0, 3.4e38, 0.0])
def test_packed_rows_are_quantized_to_themselves(form: ActivationFormat, scale: float) -> None:
    print(f"seed {SEED}")
    random = np.random.default_rng(SEED)
    x = (random.uniform(-1, 1, (200, 512)) * scale).astype(np.float32)
    packed = pack(x, form)
    assert pack(unpack(packed, form), form).tobytes() == packed.tobytes()
    assert packed.shape == (200, packed_width(512, form))
    x[3, 7], x[5, 100] = np.inf, np.nan
    assert np.isnan(unpack(pack(x, form), form)[[3, 5], [7, 100]]).all()


def test_every_scale_is_that_of_its_greatest_value() -> None:
    """Checks for every mantissa that 127 times a scale, divided by 127, is the scale: `unpack` needs this."""
    for first in (1.0, 2.0**-118, float(np.finfo(np.float32).max) / 2):
        bits = np.float32(first).view(np.uint32) & np.uint32(0xFF800000)
        top = (np.arange(1 << 23, dtype=np.uint32) + bits).view(np.float32)
        scales = top / np.float32(127)
        with np.errstate(over="ignore"):
            again = np.minimum(scales * np.float32(127), np.finfo(np.float32).max)
        assert (again / np.float32(127)).tobytes() == scales.tobytes()
