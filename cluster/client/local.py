"""A model in this process: the real engine on one stage that computes on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from llamaclust.cluster.client.base import AsyncTextClient, Chunks, TextClient
from llamaclust.cluster.client.http_codec import CHAT, Options, sampling_options
from llamaclust.cluster.client.local_settings import (
    OUTPUTS,
    ROWS,
    LocalSettings,
    blocks_of,
    scheduler_settings,
    stage_limits,
)
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.values import parse_device
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.front.dialects.embeddings import OpenAiEmbeddingBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.fields.sampling import chat_sampling
from llamaclust.cluster.front.schema import read_fields
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.embedder import Vector
from llamaclust.cluster.front.text.service import TextService, TextSettings
from llamaclust.cluster.launchers.draft_model import open_draft_model, plan_draft_model
from llamaclust.cluster.launchers.worker_settings import with_caches
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.core.errors import LlamaclustError, ParameterError, RequestError, UsageError
from llamaclust.core.gpus import placed
from llamaclust.kernels.backend import Float32
from llamaclust.model.gguf.recommended_sampling import recommended_sampling
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import check_nextn
from llamaclust.model.placement import placement_of
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs, StageTiming
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import held_layers
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox, sampled_tokens_of
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner

OpenService = Callable[[], AbstractAsyncContextManager[TextService]]

_EPOCH = 1
_DEADLINES = EngineSettings(request_s=86_400.0, result_s=3_600.0)
"""No worker can be lost here, and a large model may take its time."""


class AsyncServiceClient(AsyncTextClient):
    """`AsyncClient` of a text service in this process. The options are those of HTTP, read by the same rules."""

    def __init__(self, service: TextService) -> None:
        self.service = service

    async def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return await self.service.tokenize(text, add_special)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return self.service.tokenizer.decode(ids)

    async def chat_sampling(self) -> Options:
        return sampling_options(chat_sampling(self.service.settings.recommended, {}))

    async def chunks(self, path: str, body: dict[str, Any]) -> Chunks:
        if path == CHAT:
            request = await self.service.chat(read_fields(ChatBody, body).request())
        else:
            request, *others = read_fields(CompletionBody, body).requests()
            if others:
                raise ParameterError("prompt", f"{len(others) + 1} prompts in one call; give them one by one")
        async with await self.service.start(request) as completion:
            generation = completion.generation
            yield TextChunk(prompt_token_ids=generation.prompt, seed=generation.seed)
            async for chunk in completion:
                yield chunk

    async def _embed(self, body: dict[str, Any]) -> list[Vector]:
        fields = read_fields(OpenAiEmbeddingBody, body)
        async with self.service.embed(fields.input, fields.options(self.service.settings.pooling)) as embeddings:
            return [vector for embedding in embeddings for vector in embedding.vectors]

    async def aclose(self) -> None:
        """Its owner closes the service."""


class ServiceClient(TextClient):
    """Talks to a service that lives as long as the client."""

    _client: AsyncServiceClient

    def __init__(self, open_service: OpenService) -> None:
        """Raises what opening the service raises."""

        @asynccontextmanager
        async def opened() -> AsyncIterator[AsyncServiceClient]:
            async with open_service() as service:
                yield AsyncServiceClient(service)

        super().__init__(opened)


class LocalClient(ServiceClient):
    """`Client` without a server. `threads`: all cores by default; `feature_level`: the best there is, or what
    LLAMACLUST_FEATURE_LEVEL says."""

    def __init__(
        self,
        path: str | PathLike[str],
        threads: int | None = None,
        feature_level: str | None = None,
        settings: LocalSettings | None = None,
    ) -> None:
        """Loads the model. ModelFileError, UsageError for settings that cannot be, InsufficientMemoryError."""
        self._stage = LocalStage(Path(path).expanduser(), threads, feature_level, settings or LocalSettings())
        super().__init__(self._stage.serve)

    @property
    def feature_level(self) -> str:
        """What the kernels run at."""
        return self._stage.feature_level

    @property
    def placement(self) -> str:
        """How many layers are on GPUs, and which; "" without GPUs."""
        return self._stage.placement

    @property
    def vocabulary_size(self) -> int:
        """How many logits a token has."""
        return self._stage.scheduling.vocabulary

    def logits(self, token_ids: Sequence[int]) -> Float32:
        """Float32 [tokens, vocabulary]: what the model says after each token. RequestError for ids it does not have,
        none, or more than the context."""
        parts: list[Float32] = []
        self.each_logits(token_ids, 0, lambda part: parts.append(part.copy()))
        return np.concatenate(parts)

    def each_logits(self, token_ids: Sequence[int], start: int, use: Callable[[Float32], None]) -> None:
        """Gives `use` the rows of tokens [start, end), some at a time, in order; they are its until it returns. Errors
        as for `logits`."""
        self._stage.logits(tuple(token_ids), start, use)


class LocalStage:
    """All layers of a model, and the thread that runs them. KV blocks behind the scheduler's are for `logits`."""

    def __init__(self, path: Path, threads: int | None, feature_level: str | None, settings: LocalSettings) -> None:
        self.model = Model.open(path, settings.chat_template)
        self.scheduling = scheduler_settings(self.model, settings)
        worker = WorkerSettings(
            name="this process",
            device=_device_kind(settings, self.model),
            threads=threads,
            feature_level=feature_level or environment().feature_level or "",
            gpu_layers=settings.gpu_layers,
            gpu_memory_bytes=settings.gpu_memory_bytes,
        )
        placement = placement_of(self.model, settings.placement, settings.cpu_moe)
        device = Device.open(with_caches(worker))
        self.feature_level = device.backend.feature_level
        self._own = (self.scheduling.kv_blocks, blocks_of(self.scheduling.context_length))
        limits = stage_limits(self.scheduling, self._own)
        if settings.mtp:
            check_nextn(self.model)
            if not limits.nextn:
                raise UsageError("mtp: nothing is drafted without speculation: leave one of them out")
        with ExitStack() as opened:
            for gpu in device.gpus:
                opened.callback(gpu.close)
            held = held_layers(device, self.model, limits, placement, settings.experts_cache_bytes)
            devices = held if device.gpus else ()
            options = StageOptions(self.feature_level, device.threads, devices, nextn_backend=device.backend)
            backend, end = device.backend_for(held), self.model.layer_count
            self._runner = StageRunner(backend, self.model, 0, end, limits, options)
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
        """The model's text service; the stage is closed with it."""
        scheduling = self.scheduling
        try:
            async with Engine(LocalPipeline(self), scheduling, _DEADLINES) as engine:
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
                )
                service = TextService(engine, self.model.tokenizer, self.model.chat_template, text)
                async with aclosing(service):
                    yield service
        finally:
            self.close()

    def close(self) -> None:
        """Waits for what is computed, and frees memory."""
        self._thread.shutdown()
        self._opened.close()
        self.model.close()

    def _with_draft_model(self, path: Path, threads: int, opened: ExitStack) -> SchedulerSettings:
        """UsageError where nothing is to be drafted, and as for `plan_draft_model` and `open_draft_model`."""
        scheduling = self.scheduling
        if scheduling.speculation is None:
            raise UsageError("draft_model: nothing is drafted without speculation: leave one of them out")
        if not (scheduling.max_drafted and self.model.generates):
            raise UsageError(f"draft_model: nothing can be drafted for {self.model.file.path}; leave it out")
        plan = plan_draft_model(path, [self.model], threads, scheduling.context_length)
        unused_bytes = self._runner.memory.kv_bytes  # counts as free until answers write to it
        draft_model = opened.enter_context(open_draft_model(plan, unused_bytes))
        return replace(scheduling, speculation=replace(scheduling.speculation, draft_model=draft_model))

    def start(self, microbatch: Microbatch, inputs: SamplingInputs) -> asyncio.Future[Result]:
        """Queues a microbatch behind those that are there."""
        self.matchers.receive(inputs)
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self._compute, microbatch, inputs, perf_counter_ns())

    def _compute(self, microbatch: Microbatch, inputs: SamplingInputs, queued_ns: int) -> Result:
        started_ns = perf_counter_ns()
        logits = self._runner.run_to_sample(self._sampled_tokens.fill(microbatch), None)
        self.matchers.wait_ready(inputs)
        rows = self._runner.finish(logits, self._sampled_tokens.fill_inputs(inputs, microbatch))
        self._sampled_tokens.put(sampled_tokens_of(microbatch.number, rows))
        embeddings = self._runner.embeddings(microbatch)
        drafted = self._runner.draft(microbatch, rows, inputs)
        compute_ns = perf_counter_ns() - started_ns - drafted.drafting_ns
        timing = StageTiming(started_ns - queued_ns, compute_ns, 0, microbatch.rows)
        return Result(
            *(microbatch.epoch, microbatch.number, drafted.rows, (timing,)),
            embeddings=embeddings,
            drafting_ns=drafted.drafting_ns,
        )

    def logits(self, tokens: tuple[int, ...], first: int, use: Callable[[Float32], None]) -> None:
        """Rows [first, tokens), [some, vocabulary], computed between what the engine runs."""
        most, vocabulary = self.scheduling.context_length, self.scheduling.vocabulary
        if not 0 < len(tokens) <= most:
            raise RequestError(f"logits of {len(tokens)} tokens: give 1 to {most}, the context length")
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
            if own := self.scheduling.state_blocks:  # the block behind the scheduler's
                chunk = replace(chunk, state_from=own if start else None, state_to=(end - start, own))
            rows = self._runner.run(Microbatch(self.model.model_id, _EPOCH, 0, (chunk,)), None)
            if start >= first:
                use(rows)

    def _own_window(self, start: int, end: int) -> tuple[tuple[int, ...], int]:
        """`Chunk.window_table` and where it begins, for rows [start, end): a ring of blocks behind the scheduler's."""
        scheduling, group = self.scheduling, self.scheduling.window_group
        if group is None:
            return (), 0
        first, size = group.first_seen(start), group.sequence_blocks + group.row_blocks
        ring = (scheduling.window_blocks + block % size for block in range(first, blocks_of(end)))
        return tuple(number for block in ring for number in (block, 1)), first


class LocalPipeline:
    """See `Pipeline`: one stage, which answers in order since one thread computes."""

    def __init__(self, stage: LocalStage) -> None:
        self.epoch = _EPOCH
        self.stages: tuple[StageInfo, ...] = (StageInfo("this process", 0, stage.model.layer_count),)
        self.kv_disks = None
        self._stage = stage
        self._results: asyncio.Queue[asyncio.Future[Result]] = asyncio.Queue()

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        for each in scheduled:
            result = self._stage.start(each.microbatch, each.inputs)
            result.add_done_callback(lambda done: done.cancelled() or done.exception())  # nothing awaits later ones
            self._results.put_nowait(result)

    def prepare_matchers(self) -> None:
        self._stage.matchers.prepare()

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        while True:
            on_results([await (await self._results.get())])

    async def close(self) -> None:
        """Its owner closes the stage."""


def _device_kind(settings: LocalSettings, model: Model) -> str:
    """UsageError for a device that is none, and settings for GPUs or experts where there are none."""
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
            raise UsageError(f"{name}: {model.file.path} has no experts; leave it out")
        if kind == "cpu":
            raise UsageError(f"{name} is for GPUs: set device to cuda:0 as well")
        if name in counts and value < 0:
            raise UsageError(f"{name}: {value}: set 0 or more")
    return kind


def _pieces(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + most, end)) for at in range(start, end, most))
