"""Runs a draft model on a separate thread of this process. The pipeline waits for the drafted tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.launchers.worker_settings import with_caches
from llamaclust.cluster.scheduler.capacity import BlockCounts, Capacity, blocks_of
from llamaclust.cluster.scheduler.speculation.draft_model import DraftTimes
from llamaclust.core.drafts import MOST_ORDERS, DraftOrder, DraftReplies
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.core.sizes import missing
from llamaclust.model.loader import Model
from llamaclust.worker.devices.cores import read_cores
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import load_whole
from llamaclust.worker.drafting.model_drafter import MOST_ROWS, ModelDrafter
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.stage_runner import StageMemory, StageRunner, plan_memory

_MOST_OTHER = 128
"""Maximum difference of vocabulary sizes. Models of one family may have different numbers of padding tokens."""
_FIRST_COMPARED = 5
"""First token id that is compared. Tokens before it, such as the start of text, have different names in some files."""
_CONTEXTS = 4
_LEAST_CONTEXT = 32
_TRIED, _TRIES = 8, 4
"""Number of drafted tokens per measurement, and number of measurements."""

Compute = Callable[[Sequence[DraftOrder]], DraftReplies]


def open_device(settings: WorkerSettings) -> Device:
    level = settings.feature_level or environment().feature_level or ""
    return Device.open(with_caches(replace(settings, feature_level=level)))


@dataclass(frozen=True, slots=True)
class DraftModelPlan:
    model: Model
    device: Device
    limits: StageLimits
    memory: StageMemory
    targets: tuple[int, ...]  # Indices of the models that this model can draft for.

    @property
    def path(self) -> Path:
        return Path(self.model.file.path)


def plan_draft_model(path: Path, targets: Sequence[Model], threads: int | None, context_length: int) -> DraftModelPlan:
    """Plans the memory of a draft model from the header of its file, for sequences of `context_length` tokens. Raises
    UsageError if the model can draft for none of `targets`, and the errors of `Model.open`."""
    with of_draft_model():
        model = Model.open(path)
    if threads is not None:
        threads = min(threads, max(1, len(read_cores().hardware_threads)))
    drafted = _targets(model, targets)
    device = open_device(WorkerSettings(name="draft model", threads=threads))
    context = min(context_length, model.hyperparameters.context_length)
    if context < _LEAST_CONTEXT:
        raise UsageError(_too_short(path, context_length, model.hyperparameters.context_length))
    capacity = Capacity(context_length=context, max_sequences=MOST_ORDERS, max_outputs=MOST_ORDERS, rows=MOST_ROWS)
    limits = capacity.stage_limits(BlockCounts(_CONTEXTS * blocks_of(context)))
    memory = plan_memory(device.backend, model, 0, model.layer_count, limits)
    return DraftModelPlan(model, device, limits, memory, drafted)


class LoadedDraftModel:
    def __init__(self, plan: DraftModelPlan, stage: StageRunner) -> None:
        self.path = plan.path
        self.memory_bytes = stage.memory.total_bytes
        self.kv_bytes = stage.memory.kv_bytes
        """Bytes of KV memory, which `memory_bytes` includes."""
        self.is_lost = False
        self._drafter = ModelDrafter(stage, plan.model.hyperparameters.vocabulary_size)
        self.times = self._tried(min(MOST_ROWS, stage.limits.max_context_tokens - _TRIED))
        self._thread = ThreadPoolExecutor(1, "drafts")

    def draft(self, orders: Sequence[DraftOrder]) -> asyncio.Future[DraftReplies]:
        return self.submit(self.compute, orders)

    def submit(self, compute: Compute, orders: Sequence[DraftOrder]) -> asyncio.Future[DraftReplies]:
        return asyncio.get_running_loop().run_in_executor(self._thread, compute, orders)

    def compute(self, orders: Sequence[DraftOrder]) -> DraftReplies:
        return self._drafter.draft(orders)

    def lose(self) -> None:
        self.is_lost = True

    def _tried(self, length: int) -> DraftTimes:
        task, tokens = SampleTask(SamplingParams(), 0, 0, 0), [0] * length
        # The first draft is slow, so its time is not used.
        self._drafter.draft([DraftOrder(-1, tokens, length, 1, task)])
        taken_in = self._drafter.draft([DraftOrder(-2, tokens, length, 0, task)])
        tries = [self._drafter.draft([DraftOrder(-1, tokens, length, _TRIED, task)]) for _ in range(_TRIES)]
        if any(len(reply.tokens) < _TRIED for drafted in tries for reply in drafted.replies):
            raise UsageError(f"draft model {self.path}: its logits are not finite, so it drafts nothing; name another")
        step_ns = min(drafted.steps_ns / drafted.steps for drafted in tries)
        return DraftTimes(step_ns, taken_in.rows_ns / taken_in.rows)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._drafter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SharedDraftModel:
    """A draft model as seen by one of the models that share it. Sequence keys of different models never collide."""

    def __init__(self, model: LoadedDraftModel, number: int, sharers: int) -> None:
        self._model = model
        self._number = number
        self._sharers = sharers

    @property
    def times(self) -> DraftTimes:
        return self._model.times

    @property
    def is_lost(self) -> bool:
        return self._model.is_lost

    def lose(self) -> None:
        self._model.lose()

    def draft(self, orders: Sequence[DraftOrder]) -> asyncio.Future[DraftReplies]:
        return self._model.submit(self._compute, orders)

    def _compute(self, orders: Sequence[DraftOrder]) -> DraftReplies:
        given = [replace(order, key=order.key * self._sharers + self._number) for order in orders]
        replies = self._model.compute(given)
        own = (replace(reply, key=reply.key // self._sharers) for reply in replies.replies)
        return replace(replies, replies=tuple(own))


def open_draft_model(plan: DraftModelPlan, reserved_bytes: int = 0) -> LoadedDraftModel:
    """Loads and measures the draft model, and leaves `reserved_bytes` free. Raises InsufficientMemoryError or
    UsageError."""
    model, device = plan.model, plan.device
    free_bytes = max(0, device.free_bytes_of("cpu") - reserved_bytes)
    if plan.memory.total_bytes > free_bytes:
        raise InsufficientMemoryError(f"draft model {plan.path} needs {missing(plan.memory.parts, free_bytes)}")
    stage = load_whole(device, model, plan.limits)
    with ExitStack() as opened:
        opened.callback(stage.close)
        draft_model = LoadedDraftModel(plan, stage)
        opened.pop_all()
    return draft_model


@contextmanager
def of_draft_model() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.args = (f"draft model {error}",)
        raise


@asynccontextmanager
async def loaded_draft_model(plan: DraftModelPlan) -> AsyncIterator[LoadedDraftModel]:
    """Loads the draft model on a thread, and closes it when the context ends."""
    thread = ThreadPoolExecutor(1, "draft model")
    loading = thread.submit(open_draft_model, plan)
    thread.shutdown(wait=False)
    try:
        model = await asyncio.wrap_future(loading)
    except asyncio.CancelledError:
        loading.add_done_callback(_close_loaded)
        raise
    try:
        yield model
    finally:
        await asyncio.to_thread(model.close)


def _close_loaded(loading: Future[LoadedDraftModel]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()


def _too_short(path: Path, context: int, own_context: int) -> str:
    if own_context < _LEAST_CONTEXT:
        return f"draft model {path} is made for {own_context} tokens, but needs {_LEAST_CONTEXT} or more; name another"
    return f"draft model {path}: a context of {context} tokens is too short; give {_LEAST_CONTEXT} or more"


def _targets(model: Model, targets: Sequence[Model]) -> tuple[int, ...]:
    path = model.file.path
    if model.has_states or not (model.is_causal and model.generates):
        raise UsageError(f"draft model {path}: recurrent models, encoders and rerankers cannot draft; name another")
    refusals = [_refusal(model, target) for target in targets]
    drafted = tuple(index for index, refusal in enumerate(refusals) if not refusal)
    if not drafted:
        raise UsageError(f"draft model {path}: {'; '.join(refusals)}; name a model of the same family")
    return drafted


def _refusal(model: Model, target: Model) -> str:
    own, others = (each.file.metadata.get("tokenizer.ggml.tokens") for each in (model, target))
    if not isinstance(own, Sequence) or not isinstance(others, Sequence):
        return f"it or {target.file.path} has no vocabulary"
    both = min(len(own), len(others))
    compared = slice(_FIRST_COMPARED, both)
    if max(len(own), len(others)) - both > _MOST_OTHER or own[compared] != others[compared]:
        return f"its {len(own)} tokens differ from the {len(others)} tokens of {target.file.path}"
    return ""
