"""A draft model on a thread of this process: it drafts while the pipeline waits for its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.launchers.worker_settings import with_caches
from llamaclust.cluster.scheduler.drafting.model import DraftTimes
from llamaclust.core.drafts import DraftOrder, DraftReplies
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampling import SampleTask, SamplingParams
from llamaclust.core.sizes import missing
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.drafting.model_drafter import MOST_ORDERS, MOST_ROWS, ModelDrafter
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner, plan_memory

_MOST_OTHER = 128
"""Token ids at the end of one vocabulary that the other may lack: files of one family are padded differently."""
_CONTEXTS = 4
"""Whole contexts of KV memory."""
_LEAST_CONTEXT = 32
_TRIED, _TRIES = 8, 4
"""Tokens drafted to see how long one takes, and how many times."""


class DraftModel:
    """Made with `open_draft_model`; closed by its owner."""

    def __init__(self, path: Path, stage: StageRunner, vocabulary: int) -> None:
        self.path = path
        self.memory_bytes = stage.memory.total_bytes
        self._drafter = ModelDrafter(stage, vocabulary)
        self.times = self._tried(min(MOST_ROWS, stage.limits.max_context_tokens - _TRIED))
        self._thread = ThreadPoolExecutor(1, "drafts")

    async def draft(self, orders: Sequence[DraftOrder]) -> DraftReplies:
        """See `DraftModel` of the scheduler."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._drafter.draft, orders)

    def _tried(self, length: int) -> DraftTimes:
        """What it takes behind so many tokens of one sequence, at its quickest: other work may hold up single steps."""
        task, tokens = SampleTask(SamplingParams(), 0, 0, 0), [0] * length
        self._drafter.draft([DraftOrder(-1, tokens, length, 1, task)])  # the first one is slow
        taken_in = self._drafter.draft([DraftOrder(-2, tokens, length, 0, task)])
        tries = [self._drafter.draft([DraftOrder(-1, tokens, length, _TRIED, task)]) for _ in range(_TRIES)]
        step_ns = min(drafted.steps_ns / drafted.steps for drafted in tries)
        return DraftTimes(step_ns, taken_in.rows_ns / taken_in.rows)

    def close(self) -> None:
        """Waits for the draft that is computed."""
        self._thread.shutdown(cancel_futures=True)
        self._drafter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_draft_model(path: Path, target: Model, threads: int | None, context_length: int) -> DraftModel:
    """Loads it, with memory for sequences of the target's whole context. UsageError where its drafts could not be for
    the target; errors of `Model.open`; InsufficientMemoryError."""
    model = Model.open(path)
    _check(model, target)
    variables = environment()
    settings = WorkerSettings(name="draft model", threads=threads, feature_level=variables.feature_level or "")
    device = Device.open(with_caches(settings))
    context = min(context_length, model.hyperparameters.context_length)
    if context < _LEAST_CONTEXT:
        raise UsageError(
            f"draft model {path}: a context of {context} tokens is too short; give {_LEAST_CONTEXT} or more"
        )
    limits = StageLimits(
        max_batch_tokens=MOST_ROWS + MOST_ORDERS,
        max_outputs=MOST_ORDERS,
        max_sequences=MOST_ORDERS,
        max_context_tokens=context,
        kv_blocks=_CONTEXTS * -(-context // KV_BLOCK_TOKENS),
        kv_type=KvType.F16.value,
    )
    needed = plan_memory(device.backend, model, 0, model.layer_count, limits)
    free_bytes = device.free_bytes_of("cpu")
    if needed.total_bytes > free_bytes:
        raise InsufficientMemoryError(f"draft model {path} needs {missing(needed.parts, free_bytes)}")
    options = StageOptions(device.backend.feature_level, device.threads)
    stage = StageRunner(device.backend, model, 0, model.layer_count, limits, options)
    with ExitStack() as opened:
        opened.callback(stage.close)
        draft_model = DraftModel(path, stage, model.hyperparameters.vocabulary_size)
        opened.pop_all()
    return draft_model


def _check(model: Model, target: Model) -> None:
    """UsageError for a model whose tokens are not the target's, or that could not go back to before refused ones."""
    path = model.file.path
    if model.has_states or not (model.is_causal and model.generates):
        raise UsageError(f"draft model {path}: layers with states, encoders and rerankers cannot draft; name another")
    own, others = (each.file.metadata.get("tokenizer.ggml.tokens") for each in (model, target))
    if not isinstance(own, Sequence) or not isinstance(others, Sequence):
        raise UsageError(f"draft model {path}: it or {target.file.path} has no tokens; name another")
    both = min(len(own), len(others))
    if max(len(own), len(others)) - both > _MOST_OTHER or own[:both] != others[:both]:
        what = f"its {len(own)} tokens are not the {len(others)} of {target.file.path}"
        raise UsageError(f"draft model {path}: {what}; name a model of the same family")
