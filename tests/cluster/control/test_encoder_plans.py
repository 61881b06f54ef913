"""Tests of plans, limits and the memory ledger for a model with an encoder of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.epochs import _stage_info
from llamaclust.cluster.control.limits import check_plan, plan_limits, scheduler_settings
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster, plan_with_optional_encoder
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.context import ContextBounds, ContextChoice
from llamaclust.cluster.planner.plan import Plan, StagePlan
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Loaded
from llamaclust.wire.control.weights import EncoderFile
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from support.models.tiny_model import RandomTensor, build_tiny_model
from support.models.vision.tiny_projectors import PATCH, TEXT_WIDTH, WIDTH, build_projector
from support.wire.control_messages import LOAD, REGISTER

THREADS, SEQUENCES = 2, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    return build_tiny_model(folder / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=4)


@pytest.fixture(scope="module")
def seeing(text: Path) -> Iterator[Model]:
    with Model.open(text, mmproj=build_projector(text.with_name("p.gguf"), "idefics3")) as model:
        yield model


@pytest.fixture(scope="module")
def of_many_rows(text: Path) -> Iterator[Model]:
    """Yields a model with images of up to 1,120 rows that attend to each other."""
    side = (3 * PATCH) ** 2
    table = "v.position_embd.weight"
    path = build_projector(
        text.with_name("many.gguf"),
        "gemma4v",
        without=(table,),
        added=(RandomTensor(table, (2, 1120 * side // (3 * PATCH**2), WIDTH), 0.5, exact=True),),
        keys={"vision.image_max_pixels": 1120 * side},
    )
    with Model.open(text, mmproj=path) as model:
        yield model


async def _nothing(_: object) -> None:
    return None


def config_of(model: Model, **keys: object) -> ClusterConfig:
    values = {"model": str(model.file.path), "max_sequences": SEQUENCES, "workers": [{"name": "a"}, {"name": "b"}]}
    return ClusterConfig.model_validate(values | keys)


def planned(model: Model, config: ClusterConfig, room: int = 1 << 30, room_of_b: int = 1 << 29) -> Plan:
    rooms = {"a": room, "b": room_of_b}
    workers = {name: WorkerResources(name, n_bytes, threads=THREADS) for name, n_bytes in rooms.items()}
    return plan_cluster(config, model, ClusterResources(workers, {}))


def test_the_encoder_is_in_the_plan_to_the_byte(seeing: Model) -> None:
    assert seeing.projector is not None
    memory = encoder_bytes(seeing.projector, THREADS)
    plan = planned(seeing, config_of(seeing))
    own = [stage.encoder_bytes for stage in plan.stages if stage.encoder_bytes]
    assert own == [memory.weight_bytes + memory.workspace_bytes]
    assert memory.weight_bytes >= sum(tensor.n_bytes for tensor in seeing.projector.tensors.values())
    infos = [_stage_info(stage, plan.expert_shards) for stage in plan.stages]
    assert [info.encoder_bytes for info in infos] == [stage.encoder_bytes for stage in plan.stages]


def test_by_hand_the_larger_room_decides(seeing: Model) -> None:
    layers = [{"worker": "a", "layers": [0, 3]}, {"worker": "b", "layers": [3, 4]}]
    config = config_of(seeing, plan=layers)
    assert [bool(stage.encoder_bytes) for stage in planned(seeing, config).stages] == [True, False]
    assert [bool(stage.encoder_bytes) for stage in planned(seeing, config, 1 << 29, 1 << 30).stages] == [False, True]


def test_what_fits_without_the_encoder_alone_is_refused(seeing: Model, text: Path) -> None:
    config, margin = config_of(seeing, max_sequences=1), 1 << 16
    with Model.open(text) as plain:
        (stage,) = planned(plain, config, room_of_b=0).stages
        planned(plain, config, stage.bytes + margin, 0)
    assert seeing.projector is not None and encoder_bytes(seeing.projector, THREADS).total_bytes > margin
    with pytest.raises(InsufficientMemoryError, match="encoder of images does not fit: one worker needs"):
        planned(seeing, config, stage.bytes + margin, 0)


def test_the_ledger_counts_it(seeing: Model) -> None:
    plan, ledger = planned(seeing, config_of(seeing)), MemoryLedger()
    ledger.enter("seeing", (plan,))
    found = ledger.beside("another")
    assert found == {(stage.worker, "cpu"): stage.bytes for stage in plan.stages}
    without = replace(plan, stages=tuple(replace(stage, encoder_bytes=0) for stage in plan.stages))
    ledger.enter("seeing", (without,))
    assert found.total() - ledger.beside("another").total() == sum(stage.encoder_bytes for stage in plan.stages)
    ledger.planned("another")
    ledger.enter("seeing", (plan,))
    assert not ledger.reserve("another", (without,)), "the encoder has taken memory since"
    ledger.enter("seeing", (without,))
    assert ledger.reserve("another", (without,))


@pytest.mark.parametrize("prefill_chunk", [None, 64, 2000])
def test_a_whole_image_fits_into_a_microbatch_if_its_rows_see_each_other(
    of_many_rows: Model, prefill_chunk: int | None
) -> None:
    config = config_of(of_many_rows, **({} if prefill_chunk is None else {"prefill_chunk": prefill_chunk}))
    check_plan(config, of_many_rows)
    plan = planned(of_many_rows, config)
    rows = max(1120, prefill_chunk or 0)
    settings = scheduler_settings(config, of_many_rows, plan, None)
    assert settings.max_group_rows == rows and settings.prefill_chunk == prefill_chunk
    limits = plan_limits(config, plan, of_many_rows)
    assert limits.max_batch_tokens == settings.max_batch_tokens == rows + SEQUENCES


def test_its_rows_are_in_the_workspace(of_many_rows: Model, seeing: Model) -> None:
    large, small = (planned(model, config_of(model)).stages[0] for model in (of_many_rows, seeing))
    assert large.workspace_bytes > small.workspace_bytes
    settings = scheduler_settings(config_of(seeing), seeing, planned(seeing, config_of(seeing)), None)
    assert settings.max_group_rows == 512, "rows that see only earlier ones come in any chunks"


def test_a_loaded_stage_is_known_by_its_encoder() -> None:
    """The plans of a move may differ in the encoder alone."""
    figures = {"touched_bytes": 0, "kv_bytes": 3, "workspace_bytes": 2, "memory_bytes": None, "weight_bytes": 1}
    apart = StagePlan(worker="a", start=0, end=4, **figures)  # type: ignore[arg-type]
    plans = [
        Plan((stage,), 1, ContextChoice(16, ContextBounds.fixed(16)), (), None)
        for stage in (apart, replace(apart, encoder_bytes=10))
    ]
    handle, ledger = WorkerHandle(REGISTER, _nothing, lambda: "", Insecure()), MemoryLedger()
    order = replace(LOAD, model_id="m", start=0, end=4, devices=(), group=None, encoder=None)
    ledger.enter("m", plans)
    for encoder, planned_bytes in ((None, 6), (EncoderFile("/p.gguf", "0" * 64), 16)):
        handle.stages[1] = replace(order, encoder=encoder), Loaded(1, 1, 3, 2, encoder_bytes=planned_bytes - 6)
        assert ledger.loaded(handle) == {"cpu": planned_bytes} and handle.held_bytes == planned_bytes


@pytest.mark.parametrize("row_bytes", [0, 1 << 16])
def test_a_plan_for_text_at_least_says_why_it_has_no_encoder(seeing: Model, row_bytes: int) -> None:
    """The plan for text may use the memory of image rows, and the model keeps its projector."""
    config = config_of(seeing, max_sequences=1)
    workers = {"a": WorkerResources("a", 1 << 30, threads=THREADS)}

    def resources(free_bytes: int, row_bytes: int = 0, *, encodes: bool = True) -> ClusterResources:
        return ClusterResources(workers, {}, free_bytes=free_bytes, row_bytes=row_bytes, encodes=encodes)

    (stage,) = plan_cluster(config, seeing, resources(1 << 26, encodes=False)).stages
    room = stage.weight_bytes + stage.workspace_bytes
    while True:  # the least memory for text
        with suppress(InsufficientMemoryError):
            least = plan_cluster(config, seeing, resources(room, encodes=False))
            break
        room += 1 << 14
    plan = plan_with_optional_encoder(config, seeing, resources(room - row_bytes, row_bytes))
    assert plan == least and "the encoder of images" in plan.no_images and not plan.has_encoder
    assert seeing.projector is not None and plan_with_optional_encoder(config, seeing, resources(1 << 30)).has_encoder
    with pytest.raises(InsufficientMemoryError, match="the encoder of images"):
        plan_cluster(config, seeing, resources(room - row_bytes, row_bytes))
    with pytest.raises(InsufficientMemoryError, match="the model does not fit"):
        plan_with_optional_encoder(config, seeing, resources(room - row_bytes - (1 << 16), row_bytes))
