"""One loaded stage, which computes hidden states or row results from microbatches, one call at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from threading import Lock
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import InsufficientMemoryError, ProtocolError, UsageError, WorkerError
from llamaclust.core.gpus import CUDA, DeviceLayers
from llamaclust.core.limits import NUMERICS_VERSION, StageLimits, layer_span, max_embedded_rows
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sizes import missing
from llamaclust.kernels._native import Gatherer, MicrobatchFrame, RowOutcomes
from llamaclust.kernels.backend import (
    Backend,
    Batch,
    BatchStates,
    CacheCounts,
    Float32,
    GathersRows,
    GivenRows,
    KvInRam,
    Logits,
    Progress,
    RankedLogits,
    RanksLogits,
    RunsFrames,
    SharesKv,
    Stage,
    kv_bytes,
)
from llamaclust.kernels.multi_device import MultiDeviceStage
from llamaclust.kernels.sampling import Sampler, row_results, set_result
from llamaclust.kernels.split_experts import SplitExpertsStage
from llamaclust.model.gguf.values import MetadataValue
from llamaclust.model.grammars.vocabulary import GrammarVocabulary, read_vocabulary
from llamaclust.model.groups.division import divide
from llamaclust.model.groups.portion import Portion
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Adapt, Program
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.wire.control.messages import Load
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Microbatch, SamplingInputs, StageTiming
from llamaclust.worker.stage.arrival import frame_reader
from llamaclust.worker.stage.matchers import StageMatchers
from llamaclust.worker.stage.nextn import NextnDrafter, nextn_limits, nextn_program_of
from llamaclust.worker.stage.step_inputs import StepInputs

_MOST_REPLACEMENTS = 2
"""Maximum number of changes of adapters that wait. A group's leader may still announce the adapters before the newest,
but not earlier ones, because each change begins after the previous one on all members."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    held_weight_bytes: int = 0  # Bytes of the weights that were already in memory.

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weight_bytes, "KV memory": self.kv_bytes, "workspace": self.workspace_bytes}

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


def plan_memory(backend: Backend, model: Model, start: int, end: int, limits: StageLimits) -> StageMemory:
    return program_memory(backend, model, model_program(model, start, end, limits), limits)


def program_memory(backend: Backend, model: Model, program: Program, limits: StageLimits) -> StageMemory:
    tensors = model.tensors_for(program)
    return StageMemory(
        weight_bytes=sum(tensor.resident_bytes for tensor in tensors.values()),
        kv_bytes=kv_bytes(program, limits),
        workspace_bytes=backend.workspace_bytes(program, tensors, limits),
        held_weight_bytes=backend.held_bytes(program, tensors),
    )


def nextn_memory(backend: Backend, model: Model, beside: Program, limits: StageLimits) -> StageMemory:
    program, own = nextn_program_of(model, limits), nextn_limits(limits)
    tensors = model.tensors_for(program)
    return StageMemory(
        weight_bytes=nextn_weight_bytes(model, beside, limits),
        kv_bytes=kv_bytes(program, own),
        workspace_bytes=backend.workspace_bytes(program, tensors, own),
    )


def nextn_weight_bytes(model: Model, beside: Program, limits: StageLimits) -> int:
    names = {*nextn_program_of(model, limits).weights} - {*beside.weights}
    return sum(model.file.tensor(name).resident_bytes for name in names)


def portion_of(order: Load) -> Portion | None:
    return None if order.group is None else Portion(order.group.shares, order.group.member)


def model_program(model: Model, start: int, end: int, limits: StageLimits, portion: Portion | None = None) -> Program:
    """Returns the program of layers [start, end). Raises UsageError if they do not exist or cannot be divided."""
    shards = limits.expert_shards
    if not 0 <= start < end <= model.layer_count * shards:
        raise UsageError(
            f"layers {layer_span(start, end, shards)} do not exist: the model has {model.layer_count} layers"
        )
    program = model.program(start, end, KvType(limits.kv_type), limits.max_context_tokens, shards)
    return program if portion is None else divide(program, portion.shares, portion.member)


def kv_content(model: Model, manifest: str, limits: StageLimits) -> str:
    """Returns a digest of all that KV memory depends on, except tokens. It is equal for all splits of a model."""
    whole = model_program(model, 0, model.layer_count, replace(limits, expert_shards=1)).steps
    # Adapters are left out here, because they are part of the keys of KV blocks.
    steps = tuple(step for step in whole if not isinstance(step, Adapt))
    return sha256(repr((NUMERICS_VERSION, manifest, limits.kv_type, steps)).encode()).hexdigest()


def _grammar_vocabulary(metadata: Mapping[str, MetadataValue], size: int) -> GrammarVocabulary:
    return read_vocabulary(load_tokenizer(metadata), size)


def _adapters_digest(model: Model) -> bytes:
    return sha256(repr(sorted(model.adapter_digests.items())).encode()).digest()


def _rows_of(logits: Logits, rows: Sequence[int]) -> Float32:
    return logits.rows(rows) if isinstance(logits, RankedLogits) else logits[[*rows]]


@dataclass(frozen=True, slots=True)
class StepOutputs:
    rows: RowOutcomes
    embeddings: bytes
    drafting_ns: int

    def result(self, frame: MicrobatchFrame, timing: StageTiming) -> bytes:
        stage = timing.queue_ns, timing.compute_ns, timing.wire_ns, timing.rows
        return self.rows.result(frame, stage, "", self.embeddings, self.drafting_ns)


def batch_of(frame: MicrobatchFrame) -> Batch:
    arrays = frame.arrays
    states = None if arrays[8] is None else BatchStates(*arrays[8])
    return Batch(*arrays[:8], states, *arrays[9:11], None if arrays[11] is None else GivenRows(*arrays[11]))


@dataclass(frozen=True, slots=True)
class StageOptions:
    """Options of a stage. `feature_level` ("" for the best) and `threads` are for the sampler."""

    feature_level: str = ""
    threads: int = 1
    devices: tuple[DeviceLayers, ...] = ()  # Layers on each device, if the worker has several devices.
    progress: Progress | None = None  # Called with numbers of weight bytes as they are loaded.
    nextn_backend: Backend | None = None  # Backend of an MTP head, or None for the layers' backend.
    manifest: str | None = None  # Hash of the model's manifest on all workers, or None if files were not compared.
    portion: Portion | None = None  # Portion of a group's member, or None for the whole stage.


class StageRunner:
    def __init__(
        self,
        backend: Backend,
        model: Model,
        start: int,
        end: int,
        limits: StageLimits,
        options: StageOptions = StageOptions(),
    ) -> None:
        self.limits = limits
        self.portion = options.portion
        self.program = program = model_program(model, start, end, limits, options.portion)
        self.model = model
        self.model_id = model.model_id
        self.devices = options.devices
        self.manifest = options.manifest
        self.file_version = model.plain.version
        self.kv_content: str | None = None
        if options.manifest is not None and options.portion is None:  # The digest does not tell members of a group.
            self.kv_content = kv_content(model, options.manifest, limits)
        self.vocabulary = model.hyperparameters.vocabulary_size
        self.reader = frame_reader(program, limits, model, self.vocabulary)
        samples = program.is_last and (options.portion is None or options.portion.leads)
        self._sampler = Sampler(self.vocabulary, options.feature_level, options.threads) if samples else None
        vocabulary = partial(_grammar_vocabulary, model.file.metadata, self.vocabulary)
        self.matchers = StageMatchers(vocabulary, limits.max_sequences)
        progress = options.progress or (lambda _: None)
        self._backend = backend
        self._newest = self._stage = backend.load(program, model.tensors_for(program), limits, progress)
        self.adapters = _adapters_digest(model)
        self._replacements: list[tuple[bytes, Stage]] = []  # (digest of the adapters, stage) pairs for `settle`.
        self._replacing = Lock()
        self._gatherer: Gatherer | None = None
        self._native_stage = self._stage if isinstance(self._stage, RunsFrames) else None
        self._ranking = self._stage if isinstance(self._stage, RanksLogits) and self._stage.ranks_logits else None
        self._frame: MicrobatchFrame | None = None
        self._nextn: NextnDrafter | None = None
        if limits.nextn and self._sampler is not None:
            self._nextn = NextnDrafter(options.nextn_backend or backend, model, limits, self._sampler, progress)

    @property
    def samples(self) -> bool:
        return self._sampler is not None

    @property
    def memory(self) -> StageMemory:
        stage = self._newest
        memory = StageMemory(stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes)
        if self._nextn is None:
            return memory
        return StageMemory(
            memory.weight_bytes + nextn_weight_bytes(self.model, self.program, self.limits),
            memory.kv_bytes + self._nextn.kv_bytes,
            memory.workspace_bytes + self._nextn.workspace_bytes,
        )

    def program_of(self, model: Model) -> Program:
        return model_program(model, self.program.start, self.program.end, self.limits, self.portion)

    def adapt(self, model: Model, free_bytes: int, progress: Progress) -> None:
        """Loads adapters, which will be used after `settle`. Raises UsageError or InsufficientMemoryError."""
        program, backend = self.program_of(model), self._backend
        if not isinstance(backend, SharesKv):
            raise UsageError("adapters can be replaced only if the whole stage runs on the CPU")
        planned = program_memory(backend, model, program, self.limits)
        new = {"weights": planned.weight_bytes - planned.held_weight_bytes, "workspace": planned.workspace_bytes}
        if sum(new.values()) > free_bytes:
            layers = layer_span(program.start, program.end, self.limits.expert_shards)
            raise InsufficientMemoryError(f"layers {layers} with other adapters need {missing(new, free_bytes)}")
        stage = backend.load_beside(self._newest, program, model.tensors_for(program), self.limits, progress)
        self.program, self.model = program, model
        self.reader = frame_reader(program, self.limits, model, self.vocabulary)
        self._newest = stage
        with self._replacing:
            self._replacements.append((_adapters_digest(model), stage))
            del self._replacements[:-_MOST_REPLACEMENTS]

    def settle(self, adapters: bytes | None = None) -> None:
        """Switches to the newest adapters that `adapt` loaded, or to those with digest `adapters`. Frees older ones.
        Must not be called while a run's result is in use. Raises WorkerError if no adapters have the digest."""
        with self._replacing:
            held = self._replacements
            place = next((at for at in reversed(range(len(held))) if adapters in (None, held[at][0])), None)
            if place is None:
                if adapters not in (None, self.adapters):
                    raise WorkerError("the leader of the group uses adapters that this worker does not have")
                return
            self.adapters, stage = held[place]
            del held[: place + 1]
        if self._gatherer is not None and isinstance(stage, GathersRows):
            stage.gather_by(self._gatherer)
        self._stage = stage
        self._native_stage = stage if isinstance(stage, RunsFrames) else None

    def run(self, microbatch: Microbatch, hidden: Float32 | None) -> Float32:
        """Returns hidden states [rows, embedding], or the last stage's logits [outputs, vocabulary]. They are valid
        until the next run. `hidden` is None for a first stage. Raises ProtocolError if the microbatch is invalid."""
        self.settle()
        self._frame = frame = self.read(microbatch, hidden)
        return self._stage.run(batch_of(frame), frame.hidden)

    def run_to_sample(self, microbatch: Microbatch) -> Logits:
        return self.run_frame(self.read(microbatch))

    def read(self, microbatch: Microbatch, hidden: Float32 | None = None) -> MicrobatchFrame:
        return self.reader.read(encode_hidden(encode_microbatch(microbatch), hidden))

    def run_frame(self, frame: MicrobatchFrame) -> Logits:
        """Computes a microbatch whose tokens are known, with the adapters of the last `settle`. Logits may stay in a
        GPU's memory."""
        self._frame = frame
        if self._native_stage is not None:
            return self._native_stage.run_frame(frame)
        batch, hidden = batch_of(frame), frame.hidden
        return self._stage.run(batch, hidden) if self._ranking is None else self._ranking.run_ranked(batch, hidden)

    def gather_by(self, gatherer: Gatherer) -> None:
        assert isinstance(self._stage, GathersRows), "experts in RAM are refused in groups"
        self._gatherer = gatherer
        self._stage.gather_by(gatherer)

    def finish(self, logits: Logits, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        return row_results(self.finish_step(logits, StepInputs.read(encode_inputs(inputs))).rows)

    def finish_step(self, logits: Logits, inputs: StepInputs) -> StepOutputs:
        """Samples, scores and drafts. Raises ProtocolError if `inputs` are invalid or request too many embeddings."""
        rows = self.sample(logits, inputs)
        embeddings = self.embeddings()
        if self._nextn is None:
            return StepOutputs(rows, embeddings, 0)
        begun_ns = perf_counter_ns()
        self._nextn.draft(self._last, self._stage.normed, rows, inputs.tasks)
        return StepOutputs(rows, embeddings, perf_counter_ns() - begun_ns)

    def embeddings(self) -> bytes:
        rows = self._last.embedded_rows
        if not len(rows):
            return b""
        assert self.program.normed is not None, "only a last stage has it"
        most = max_embedded_rows(self.program.normed.width)
        if len(rows) > most:
            raise ProtocolError(f"a microbatch requests the embeddings of {len(rows)} rows; the limit is {most}")
        return self._stage.normed(rows).astype("<f4").tobytes()

    @property
    def _last(self) -> MicrobatchFrame:
        assert self._frame is not None, "it follows a run"
        return self._frame

    def sample(self, logits: Logits, inputs: StepInputs) -> RowOutcomes:
        assert self._sampler is not None, "only a last stage has logits"
        tasks = inputs.tasks
        tasks.complete(self._last)
        if not (tasks.matcher_rows or tasks.released):
            return self._sampler.sample(logits, tasks)
        for place in self.matchers.begin(tasks):
            tasks.allow_suppressed(place)
        outcomes = self._sampler.sample(logits, tasks)
        results = [*row_results(outcomes)]
        while refused := self.matchers.take(results):
            again = tasks.second_draws([*refused], [*refused.values()])
            found = row_results(self._sampler.sample(_rows_of(logits, [*refused]), again))
            for place, row in zip(refused, found, strict=True):
                results[place] = row
        for place, *_ in tasks.matcher_rows:
            set_result(outcomes, place, results[place])
        return outcomes

    @property
    def kv_layers(self) -> Sequence[Sequence[NDArray[np.uint8]]]:
        """KV memory by layer. Raises ProtocolError if it is on a GPU, or if layers have a window or a state."""
        if not isinstance(self._stage, KvInRam) or self.limits.window_blocks or self.limits.state_blocks:
            raise ProtocolError("KV memory is not kept on disk if it is on a GPU or if layers have a window or a state")
        return self._stage.kv_layers()

    @property
    def is_on_gpus(self) -> bool:
        """True if all weights are in GPU memory and no step waits for another worker."""
        in_vram = (part.device.startswith(CUDA) and not part.cpu_moe for part in self.devices)
        return bool(self.devices) and all(in_vram) and self._nextn is None and self.portion is None

    @property
    def device_bytes(self) -> dict[str, int]:
        if not self.devices:
            return {"cpu": self.memory.total_bytes}
        stages = self._stage.stages if isinstance(self._stage, MultiDeviceStage) else (self._stage,)
        taken = dict.fromkeys((part.device for part in self.devices), 0)
        for part, stage in zip(self.devices, stages, strict=True):
            taken[part.device] += stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes
            if isinstance(stage, SplitExpertsStage):
                in_ram = stage.experts.weight_bytes + stage.experts.workspace_bytes
                taken[part.device] -= in_ram
                taken["cpu"] = taken.get("cpu", 0) + in_ram
        if self._nextn is not None:
            taken["cpu"] = taken.get("cpu", 0) + self.memory.total_bytes - sum(taken.values())
        return taken

    @property
    def split_stages(self) -> tuple[SplitExpertsStage, ...]:
        stages = self._stage.stages if isinstance(self._stage, MultiDeviceStage) else (self._stage,)
        return tuple(stage for stage in stages if isinstance(stage, SplitExpertsStage))

    @property
    def experts_cache(self) -> CacheCounts:
        caches = (stage.cache for stage in self.split_stages)
        return sum((cache.counts for cache in caches if cache is not None), CacheCounts())

    @property
    def weights(self) -> object:
        return self._newest.weights if self._nextn is None else (self._newest.weights, self._nextn.weights)

    def close(self) -> None:
        self.matchers.close()
        if self._nextn is not None:
            self._nextn.close()
        self._stage.close()
        self._newest.close()
