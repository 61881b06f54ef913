"""Runs a whole model in this process. One stage computes all layers on a separate thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING

from llamaclust.cluster.config.values import OFF, parse_device
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.pipeline import PipelineEncoder, StageInfo
from llamaclust.cluster.front.text.image_rows import RowCache
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.front.text.vision import vision_of
from llamaclust.cluster.launchers.models.draft_model import open_device, open_draft_model, plan_draft_model
from llamaclust.cluster.launchers.models.local_encoder import LocalEncoder
from llamaclust.cluster.launchers.models.projectors import open_with_projector
from llamaclust.cluster.launchers.models.row_memory import row_limits
from llamaclust.cluster.planner.context import ContextBound, ContextBounds
from llamaclust.cluster.scheduler.capacity import (
    ROWS,
    BlockCounts,
    Capacity,
    blocks_of,
    longest_context,
    microbatch_rows,
)
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.kv.groups import WindowGroup
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, RequestError, UsageError
from llamaclust.core.gpus import placed
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS
from llamaclust.model.gguf.recommended_sampling import recommended_sampling
from llamaclust.model.images.preparation import ImagePreparation
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import check_nextn
from llamaclust.model.placement import PlacementRule, placement_of
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SampledTokens, SamplingInputs, StageTiming
from llamaclust.wire.microbatch.results import decode_result
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import held_layers, load_whole
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.dependencies import SampledTokensBox
from llamaclust.worker.stage.step_inputs import StepInputs

if TYPE_CHECKING:
    from llamaclust.kernels.backend import Float32

_EPOCH = 1
_DEADLINES = EngineSettings(request_s=86_400.0, result_s=3_600.0)
"""Long deadlines, because a large model may be slow."""
_CONTEXT_TOKENS = 4096
OUTPUTS = 256


@dataclass(frozen=True, slots=True)
class LocalSettings:
    # Maximum number of tokens in a sequence. None: the length that the model was trained for, but at most 4096.
    context_length: int | None = None
    max_sequences: int = 8  # Maximum number of sequences that run at the same time. Others wait.
    # Maximum number of prompt tokens computed at once. None: chosen by the scheduler.
    prefill_chunk: int | None = None
    prefix_cache: bool = True
    kv_blocks: int | None = None  # Number of KV blocks, each for 16 tokens. None: enough for two full-length sequences.
    kv_type: KvType = KvType.F16
    chat_template: str | None = None  # Name of a built-in template, or a file. None: the model's template.
    # Projector file. None: the only projector in the model's folder. OFF: images are not read.
    mmproj: str | None = OFF
    speculation: bool = True  # True to check drafted tokens in each step where this is faster.
    draft_model: Path | None = None  # File of a small draft model with the same vocabulary.
    mtp: bool = False  # True to draft with the model's head for multi-token prediction.
    # "cpu", or GPUs used in addition to the processor, such as "cuda:0" or "cuda:0,cuda:1".
    device: str = "cpu"
    # Number of layers, counted from the last, to put on GPUs. None: as many as fit.
    gpu_layers: int | None = None
    gpu_memory_bytes: int | None = None  # Maximum number of bytes to use on each GPU. None: all free bytes.
    # Number of layers, counted from the first, whose experts stay in RAM. None: as few as GPU memory allows.
    cpu_moe: int | None = None
    # Rules that place tensors. The first matching rule applies. Rules take precedence over `cpu_moe`.
    placement: tuple[PlacementRule, ...] = ()
    # Maximum bytes per GPU for caching experts that stay in RAM. None: all free bytes.
    experts_cache_bytes: int | None = None


def local_capacity(model: Model, settings: LocalSettings) -> Capacity:
    longest = longest_context(model)
    context = settings.context_length or min(longest, _CONTEXT_TOKENS)
    if not 0 < context <= longest:
        raise UsageError(f"context_length is {context}, but the model allows only 1 to {longest} tokens")
    for name, value, most in (
        ("max_sequences", settings.max_sequences, OUTPUTS),
        ("prefill_chunk", settings.prefill_chunk, MAX_BATCH_TOKENS - settings.max_sequences),
        ("kv_blocks", settings.kv_blocks, MAX_KV_BLOCKS - blocks_of(context)),
    ):
        if value is not None and not 0 < value <= most:
            raise UsageError(f"{name} is {value}, which is out of range; set a value from 1 to {most}")
    if settings.kv_type not in set(KvType):
        raise UsageError(f"kv_type {settings.kv_type} is unknown; set one of {', '.join(KvType)}")
    return Capacity(
        context_length=context,
        max_sequences=settings.max_sequences,
        max_outputs=OUTPUTS,
        rows=microbatch_rows(model, context),
        prefill_chunk=settings.prefill_chunk,
        kv_type=KvType(settings.kv_type),
        prefix_cache=settings.prefix_cache,
        mtp=settings.mtp,
    )


def _speculation(model: Model, settings: LocalSettings) -> SpeculationSettings | None:
    if settings.mtp:
        check_nextn(model)
    if settings.speculation:
        return SpeculationSettings(NgramDrafters(), mtp=settings.mtp)
    for name in ("mtp", "draft_model"):
        if getattr(settings, name):
            raise UsageError(
                f"{name}: drafting needs speculation, which is off; set speculation to True, or remove {name}"
            )
    return None


class LocalStage:
    """All layers of a model, and the thread that runs them."""

    def __init__(self, path: Path, threads: int | None, feature_level: str | None, settings: LocalSettings) -> None:
        self.model, self.unused_projectors = open_with_projector(path, settings.mmproj, settings.chat_template)
        speculation, capacity = _speculation(self.model, settings), local_capacity(self.model, settings)
        context_blocks = blocks_of(capacity.context_length)
        blocks = capacity.blocks(self.model, settings.kv_blocks or 2 * context_blocks)
        self.scheduling = capacity.scheduler_settings(self.model, blocks, speculation)
        worker = WorkerSettings(
            name="this process",
            device=_device_kind(settings, self.model),
            threads=threads,
            feature_level=feature_level or "",
            gpu_layers=settings.gpu_layers,
            gpu_memory_bytes=settings.gpu_memory_bytes,
        )
        placement = placement_of(self.model, settings.placement, settings.cpu_moe)
        device = open_device(worker)
        self.feature_level = device.backend.feature_level
        self._own = (blocks.kv, context_blocks)
        limits = capacity.stage_limits(_with_own(blocks, context_blocks, self.scheduling.window_group))
        with ExitStack() as opened:
            opened.callback(device.close)
            self._row_limits = row_limits()
            self.encoder = self._open_encoder(device, settings, opened)
            held = held_layers(device, self.model, limits, placement, settings.experts_cache_bytes)
            self._runner = load_whole(device, self.model, limits, held if device.gpus else ())
            opened.callback(self._runner.close)
            if settings.draft_model is not None:
                self.scheduling = self._with_draft_model(settings.draft_model, device.threads, opened)
            self._opened = opened.pop_all()
        self.placement = placed(held) if device.gpus else ""
        self.matchers = self._runner.matchers
        self._sampled_tokens = SampledTokensBox()
        self._thread = ThreadPoolExecutor(1, "compute")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[TextService]:
        scheduling = self.scheduling
        try:
            projector = None if self.encoder is None else self.model.projector
            async with Engine(LocalPipeline(self), scheduling, _DEADLINES, projector=projector) as engine:
                text = TextSettings(
                    self.model.file.path.stem,
                    scheduling.context_length,
                    scheduling.max_sequences,
                    embedding_length=self.model.embedding_width,
                    pooling=self.model.pooling,
                    ranking=self.model.ranking,
                    generates=self.model.generates,
                    max_drafted=scheduling.max_drafted,
                    recommended=recommended_sampling(self.model.file),
                    context_bounds=self._context_bounds,
                )
                async with ImagePreparation() as preparation:
                    vision = vision_of(self.model, engine.encoder, preparation, RowCache(self._row_limits))
                    service = TextService(engine, self.model.tokenizer, self.model.chat_template, text, vision)
                    async with aclosing(service):
                        yield service
        finally:
            await asyncio.to_thread(self.close)

    @property
    def _context_bounds(self) -> ContextBounds:
        tokens = self.scheduling.context_length
        return ContextBounds(tokens, tokens, self.model.hyperparameters.context_length, ContextBound.KEY)

    def _open_encoder(self, device: Device, settings: LocalSettings, opened: ExitStack) -> LocalEncoder | None:
        if self.model.projector is None:
            return None
        try:
            return opened.enter_context(LocalEncoder(device, self.model.projector))
        except InsufficientMemoryError as error:
            if settings.mmproj is not None:
                raise
            self.unused_projectors = f"images are not read: {error}"
            return None

    def close(self) -> None:
        self._thread.shutdown()
        self._opened.close()
        self.model.close()

    def _with_draft_model(self, path: Path, threads: int, opened: ExitStack) -> SchedulerSettings:
        scheduling = self.scheduling
        if scheduling.speculation is None or not scheduling.max_drafted:
            raise UsageError(f"draft_model: nothing can be drafted for {self.model.file.path}; remove draft_model")
        plan = plan_draft_model(path, [self.model], threads, scheduling.context_length)
        # KV memory counts as free until answers write to it, so it is subtracted.
        unused_bytes = self._runner.memory.kv_bytes
        draft_model = opened.enter_context(open_draft_model(plan, unused_bytes))
        return replace(scheduling, speculation=replace(scheduling.speculation, draft_model=draft_model))

    def start(self, microbatch: Microbatch, inputs: SamplingInputs) -> asyncio.Future[Result]:
        received = StepInputs.read(encode_inputs(inputs))
        self.matchers.receive(received)
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self._compute, microbatch, received, perf_counter_ns())

    def _compute(self, microbatch: Microbatch, inputs: StepInputs, queued_ns: int) -> Result:
        started_ns = perf_counter_ns()
        runner, frame = self._runner, self._runner.read(microbatch)
        self._sampled_tokens.fill(frame)
        logits = runner.run_frame(frame)
        self.matchers.wait_ready(inputs.tasks)
        outputs = runner.finish_step(logits, inputs)
        self._sampled_tokens.put(SampledTokens(microbatch.number, tuple(outputs.rows.tokens)))
        compute_ns = perf_counter_ns() - started_ns - outputs.drafting_ns
        return decode_result(outputs.result(frame, StageTiming(started_ns - queued_ns, compute_ns, 0, frame.rows)))

    def logits(self, tokens: tuple[int, ...], first: int, use: Callable[[Float32], None]) -> None:
        """Calls `use` with the logits of tokens `first` and later, in blocks [rows, vocabulary]. Microbatches wait."""
        most, vocabulary = self.scheduling.context_length, self.scheduling.vocabulary
        if not 0 < len(tokens) <= most:
            raise RequestError(f"logits need 1 to {most} tokens (the context length), but {len(tokens)} are given")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise RequestError(f"a token id is outside the vocabulary [0, {vocabulary})")
        try:
            computed = self._thread.submit(self._logits, tokens, first, use)
        except RuntimeError as error:
            raise LlamaclustError("the client is closed") from error
        computed.result()

    def _logits(self, tokens: tuple[int, ...], first: int, use: Callable[[Float32], None]) -> None:
        for start, end in (*_pieces(0, first, ROWS), *_pieces(first, len(tokens), OUTPUTS)):
            outputs = end - start if start >= first else 0
            chunk = Chunk(tokens[start:end], start, self._own, outputs, None, *self._own_window(start, end))
            if own := self.scheduling.state_blocks:  # Index of a state block that the scheduler does not use.
                chunk = replace(chunk, state_from=own if start else None, state_to=(end - start, own))
            rows = self._runner.run(Microbatch(self.model.model_id, _EPOCH, 0, (chunk,)), None)
            if start >= first:
                use(rows)

    def _own_window(self, start: int, end: int) -> tuple[tuple[int, ...], int]:
        scheduling, group = self.scheduling, self.scheduling.window_group
        if group is None:
            return (), 0
        first, size = group.first_seen(start), group.sequence_blocks + group.row_blocks
        ring = (scheduling.window_blocks + block % size for block in range(first, blocks_of(end)))
        return tuple(number for block in ring for number in (block, 1)), first


class LocalPipeline:
    """A `Pipeline` with one stage. Results come in order, because a single thread computes them."""

    def __init__(self, stage: LocalStage) -> None:
        self.epoch = _EPOCH
        self.stages: tuple[StageInfo, ...] = (StageInfo("this process", 0, stage.model.layer_count),)
        self.workers = frozenset[str]()
        self.kv_disks = None
        self.encoder: PipelineEncoder | None = stage.encoder
        self.no_images = ""
        self._stage = stage
        self._results: asyncio.Queue[asyncio.Future[Result]] = asyncio.Queue()

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        for each in scheduled:
            result = self._stage.start(each.microbatch, each.inputs)
            # Retrieves the exception, because results after a failed one are never awaited.
            result.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._results.put_nowait(result)

    def prepare_matchers(self) -> None:
        self._stage.matchers.prepare()

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        while True:
            on_results([await (await self._results.get())])

    async def close(self) -> None:
        """Does nothing, because the owner of the stage closes it."""


def _device_kind(settings: LocalSettings, model: Model) -> str:
    """Returns the kind of device. Raises UsageError if the device is unknown or a setting does not suit it."""
    try:
        kind = parse_device(settings.device)
    except ValueError as error:
        raise UsageError(f"device: {error}") from error
    counts = {name: getattr(settings, name) for name in ("cpu_moe", "experts_cache_bytes", "gpu_layers")}
    given = {**counts, "gpu_memory_bytes": settings.gpu_memory_bytes, "placement": settings.placement or None}
    for name, value in given.items():
        if value is None or (name, value) == ("experts_cache_bytes", 0):
            continue
        if name in ("cpu_moe", "experts_cache_bytes") and not model.hyperparameters.expert_count:
            raise UsageError(f"{name}: {model.file.path} has no experts; remove {name}")
        if kind == "cpu":
            raise UsageError(f"{name} is for GPUs; set device to cuda:0 as well")
        if name in counts and value < 0:
            raise UsageError(f"{name} is {value}; set 0 or more")
    return kind


def _with_own(blocks: BlockCounts, context_blocks: int, window: WindowGroup | None) -> BlockCounts:
    own_window = 0 if window is None else window.sequence_blocks + window.row_blocks
    return BlockCounts(blocks.kv + context_blocks, blocks.window + own_window, blocks.states and blocks.states + 1)


def _pieces(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + most, end)) for at in range(start, end, most))
