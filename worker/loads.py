from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from llamaclust.core.epochs import epoch_text, term_of
from llamaclust.core.errors import (
    DeadlineError,
    InsufficientMemoryError,
    LoadCancelledError,
    ProtocolError,
    UsageError,
    WorkerError,
)
from llamaclust.core.gpus import placed
from llamaclust.core.limits import layer_span
from llamaclust.wire.control.groups import GroupFault, GroupOrder
from llamaclust.wire.control.messages import (
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    PeerUnreachable,
    Quiet,
    Unload,
    Unloaded,
    UnloadFailed,
)
from llamaclust.wire.control.weights import AdapterFiles, AdaptersSet, FindWeights, SetAdapters
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.devices.encoder_limits import ENCODER_NICENESS
from llamaclust.worker.encoder.streams import EncoderStreams
from llamaclust.worker.groups.link_opener import LinkOpener
from llamaclust.worker.groups.member_links import MemberLinks
from llamaclust.worker.service import LoadedStage
from llamaclust.worker.session import Session
from llamaclust.worker.stage.following import FollowingStage
from llamaclust.worker.stage.leading import Leader
from llamaclust.worker.stage.loop import StageContext
from llamaclust.worker.stage.stage_runner import StageMemory, StageRunner
from llamaclust.worker.stage.streams import Neighbours, StageStreams
from llamaclust.worker.weights.load import load_adapters, load_encoder, load_stage
from llamaclust.worker.weights.weights import Progress

_KV_DISK_S = 55.0
"""Time limit for a disk with KV memory. It is shorter than the time after which a load without progress fails."""

_QUIET_S = 50.0
"""Time limit for reading a grammar vocabulary, which the process may spend without heartbeats on a busy machine."""

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


def _check_kv_disk(order: Load) -> None:
    if order.limits.expert_shards > 1:
        what = "KV memory is not kept on disk if a layer's experts are on several workers"
        raise UsageError(f"kv_disk: {what}; start this worker without kv_disk")
    if order.limits.window_blocks or order.limits.state_blocks:
        what = "KV memory of layers with a window or a state is not kept on disk"
        raise UsageError(f"kv_disk: {what}, but this model has such layers; start this worker without kv_disk")


def _span(order: Load) -> str:
    return layer_span(order.start, order.end, order.limits.expert_shards)


def _cancel_once(loading: asyncio.Task[Loaded]) -> None:
    """Cancels a load once. A second cancellation would free the worker's lock before the load's thread has ended."""
    if not loading.cancelling():
        loading.cancel()


class Loads:
    """Loads and unloads stages during one membership. Each operation holds the worker's `exclusive` lock."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._worker = session.worker
        self._exclusive = session.worker.exclusive
        self._loading: dict[int, asyncio.Task[Loaded]] = {}
        self._has_ended = False

    def end(self) -> None:
        """Cancels all loads. No stage of this membership is added to the service afterwards."""
        self._has_ended = True
        for loading in self._loading.values():
            _cancel_once(loading)

    async def load(self, order: Load) -> None:
        layers = f"layers {_span(order)} of epoch {epoch_text(order.epoch)}"
        await self._session.answer(self._loaded(order), partial(LoadFailed, order.epoch), layers)

    async def _loaded(self, order: Load) -> Loaded:
        if order.epoch in self._loading:
            raise ProtocolError(f"epoch {epoch_text(order.epoch)} is already being loaded")
        loading = self._loading[order.epoch] = asyncio.create_task(self._load(order))
        try:
            await asyncio.wait((loading,))
            if loading.cancelled():
                raise LoadCancelledError("the load was cancelled")
            return loading.result()
        finally:
            _cancel_once(loading)
            del self._loading[order.epoch]

    async def unload(self, order: Unload) -> None:
        if (loading := self._loading.get(order.epoch)) is not None:
            _cancel_once(loading)
        async with self._exclusive:
            what = f"unload of epoch {epoch_text(order.epoch)}"
            await self._session.answer(self._unload(order), partial(UnloadFailed, order.epoch), what)

    async def _unload(self, order: Unload) -> Unloaded:
        await self._worker.service.remove(order.epoch)
        return Unloaded(order.epoch)

    async def set_adapters(self, order: SetAdapters) -> AdaptersSet:
        async with self._exclusive:
            stage = self._worker.service.stage(order.epoch)
            await self._adapt(stage.runner, order.adapters)
            if isinstance(stage, StageStreams):
                await stage.settle()
        memory = stage.runner.memory
        return AdaptersSet(memory.weight_bytes, memory.workspace_bytes, order.request_id)

    async def _adapt(self, runner: StageRunner, adapters: AdapterFiles) -> None:
        if {adapter.number: adapter.adapter_id for adapter in adapters} != runner.model.adapter_digests:
            await load_adapters(adapters, runner, self._worker.device, self._worker.weights, self._session.source)

    async def _load(self, order: Load) -> Loaded:
        async with self._exclusive:
            return await self._load_alone(order)

    async def _load_alone(self, order: Load) -> Loaded:
        service, weights = self._worker.service, self._worker.weights
        self._worker.terms.see(term_of(order.epoch))
        if order.epoch in service:
            raise ProtocolError(f"epoch {epoch_text(order.epoch)} is already loaded")
        links = None if order.group is None else self._member_links(order.epoch, order.group)
        received_bytes = weights.received_bytes
        if self._worker.kv_disk is not None:
            _check_kv_disk(order)
            # Waits for jobs that still use a kept stage's KV memory, because the stage will be used again.
            await self._worker.kv_disk.idle(_KV_DISK_S)
        held = await service.clear(order.model_id) if order.exclusive else []
        try:
            # All parts of the load share one progress, because only increases extend the load's deadline.
            progress = Progress(partial(self._progressed, order.epoch))
            memory, encoder_bytes = await self._add(order, links, held, progress)
        finally:
            held.clear()
        epoch, where = epoch_text(order.epoch), f", {placed(order.devices)}" if order.devices else ""
        _log.info("layers %s are loaded as epoch %s%s", _span(order), epoch, where)
        fetched_bytes = weights.received_bytes - received_bytes
        stage_bytes = memory.weight_bytes, memory.kv_bytes, memory.workspace_bytes
        return Loaded(order.epoch, *stage_bytes, fetched_bytes, encoder_bytes)

    async def _progressed(self, epoch: int, done_bytes: int, total_bytes: int) -> None:
        await self._session.send(LoadProgress(epoch, done_bytes, total_bytes))

    async def _add(
        self, order: Load, links: MemberLinks | None, held: list[object], progress: Progress
    ) -> tuple[StageMemory, int]:
        runner: StageRunner | None = None
        encoder: EncoderStreams | None = None
        try:
            runner = await self._kept(order)
            encoder = await self._encoder(order, held, progress)
            if runner is not None and not await self._has_adapted(runner, order.adapters):
                kept, runner = runner, None
                await self._worker.compute.run(kept.close)
            if runner is None:
                reserved_bytes = 0 if encoder is None else encoder.encoder.reserved_bytes
                runner = await self._new_stage(order, held, progress, reserved_bytes)
            await self._prepare_matchers(runner)
            if self._has_ended:
                raise LoadCancelledError("the membership has ended")
            self._worker.service.add(self._held(order, runner, links), encoder)
        except BaseException:
            if links is not None:
                links.close()
            if encoder is not None:
                await self._worker.service.free_encoder(encoder)
            if runner is not None:
                await self._worker.compute.run(runner.close)
            raise
        return runner.memory, 0 if encoder is None else encoder.encoder.memory.total_bytes

    async def _new_stage(self, order: Load, held: list[object], progress: Progress, reserved_bytes: int) -> StageRunner:
        place = self._worker.device, progress, self._worker.weights, self._session.source
        return await self._with_room(held, lambda: load_stage(order, *place, reserved_bytes))

    async def _prepare_matchers(self, runner: StageRunner) -> None:
        """Reads the grammar vocabulary before the stage serves. An error fails answers with grammars, not the load."""
        if not runner.samples or runner.matchers.has_vocabulary:
            return
        await self._session.send(Quiet(_QUIET_S))
        try:
            await asyncio.wait([asyncio.wrap_future(runner.matchers.prepare())], timeout=_QUIET_S)
        finally:
            with contextlib.suppress(WorkerError):
                await self._session.send(Quiet(0.0))

    async def _has_adapted(self, runner: StageRunner, adapters: AdapterFiles) -> bool:
        """Replaces a kept stage's adapters. Returns False if free memory does not suffice for a second workspace."""
        try:
            await self._adapt(runner, adapters)
        except InsufficientMemoryError:
            return False
        return True

    async def _kept(self, order: Load) -> StageRunner | None:
        service, wanted = self._worker.service, FindWeights(order.model_path, order.model_id)
        version = await self._version(wanted) if service.has_kept else None
        runner = await service.take_kept(order, version)
        if runner is not None:
            _log.info("layers %s: its weights were kept", _span(order))
        return runner

    async def _encoder(self, order: Load, held: list[object], progress: Progress) -> EncoderStreams | None:
        service, wanted = self._worker.service, order.encoder
        version = None
        if wanted is not None and service.has_kept:
            version = await self._version(FindWeights(order.model_path, order.model_id, encoder=wanted))
        kept = await service.take_kept_encoder(wanted, version)
        if wanted is None or kept is not None:
            return kept
        place = self._worker.device, progress, self._worker.weights, self._session.source
        encoder = await self._with_room(held, lambda: load_encoder(wanted, *place))
        _log.info("the image encoder of epoch %s is loaded", epoch_text(order.epoch))
        return EncoderStreams(encoder, self._worker.compute.apart(ENCODER_NICENESS))

    async def _with_room(self, held: list[object], load: Callable[[], Awaitable[_Value]]) -> _Value:
        """Calls `load`. If memory is short, waits for closed encoders and calls `load` again. If memory is still short,
        frees the objects in `held` and calls `load` once more."""
        try:
            return await load()
        except InsufficientMemoryError:
            has_waited = await self._worker.service.last_tiles()
            if not (has_waited or held):
                raise
        if has_waited:
            try:
                return await load()
            except InsufficientMemoryError:
                if not held:
                    raise
        held.clear()
        return await load()

    async def _version(self, wanted: FindWeights) -> str | None:
        return await asyncio.to_thread(self._worker.weights.version_of, wanted)

    def _held(self, order: Load, runner: StageRunner, links: MemberLinks | None) -> LoadedStage:
        session, name, counters = self._session, self._worker.name, self._session.counters
        if links is not None and runner.portion is not None and not runner.portion.leads:
            return FollowingStage(order.epoch, runner, counters, links, self._worker.compute.give_up)
        context = StageContext(name, self._worker.compute, counters)
        if links is not None:
            leader = Leader(order.epoch, links, runner.gather_by)
            context = StageContext(name, self._worker.compute.apart(), counters, leader)
        neighbours = Neighbours(
            partial(self._report_unreachable, order.epoch),
            session.peer(order.next_address, order.next_worker) if order.next_address else None,
            session.peer(order.first_address, order.first_worker) if order.first_address else None,
            order.previous_worker,
            order.last_worker,
        )
        return StageStreams(order.epoch, runner, context, session.deadlines, neighbours, links)

    def _member_links(self, epoch: int, group: GroupOrder) -> MemberLinks:
        session = self._session
        links = LinkOpener(group, session.credentials, self._worker.links)
        return MemberLinks(epoch, group, links, session.deadlines, self._report)

    async def _report(self, fault: GroupFault | PeerUnreachable) -> None:
        level = logging.ERROR if fault.worker == self._worker.name else logging.INFO
        whose = "" if fault.reason.startswith(f"worker {fault.worker}") else f"worker {fault.worker}: "
        _log.log(level, "epoch %s: %s%s", epoch_text(fault.epoch), whose, fault.reason)
        with contextlib.suppress(WorkerError, DeadlineError):
            async with deadline("reporting to the coordinator", self._session.deadlines.peer_s):
                await self._session.send(fault)

    async def _report_unreachable(self, epoch: int, peer: Peer, reason: str) -> None:
        if peer.worker is not None:
            await self._report(PeerUnreachable(epoch, peer.worker, reason))
