from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from llamaclust.core.errors import LlamaclustError, ModelFileError, ProtocolError, WorkerError
from llamaclust.core.logs import last_lines
from llamaclust.model.loader import Model
from llamaclust.wire.control import kv_disk, logs, messages, profiles, weights
from llamaclust.wire.rpc.link_probe import measure_link, try_link
from llamaclust.wire.rpc.network_probe import network_round_trip
from llamaclust.worker.devices.system_info import release_freed_memory, resident_bytes
from llamaclust.worker.session import Session
from llamaclust.worker.weights.weights import Progress

_REPORT_S = 0.25
SettingAdapters = Callable[[weights.SetAdapters], Awaitable[weights.AdaptersSet]]


class Requests:
    """Answers one membership's requests. Requests that need the whole machine hold the worker's `exclusive` lock."""

    def __init__(self, session: Session, set_adapters: SettingAdapters) -> None:
        self._session = session
        self._set_adapters = set_adapters
        self._exclusive = session.worker.exclusive
        self._measuring = set[Progress]()

    def cancel_measurements(self) -> None:
        for progress in self._measuring:
            progress.cancel()

    async def answer(self, request: messages.WorkerRequest) -> None:
        failed = partial(messages.RequestFailed, request_id=request.request_id)
        await self._session.answer(self._answer(request), failed, type(request).__name__)

    async def _answer(self, request: messages.WorkerRequest) -> messages.WorkerMessage:
        match request:
            case profiles.ProfileWorker():
                return await self._measured(request)
            case profiles.ProfileLinks(ends, request_id):
                async with self._exclusive:
                    links = [await self._profile_link(end) for end in ends]
                return profiles.LinkProfiles(tuple(links), request_id)
            case weights.FindWeights():
                return await self._find_weights(request)
            case weights.SetAdapters():
                return await self._set_adapters(request)
            case messages.ProbePeer():
                return await self._probe(request)
            case logs.GetLog(request_id):
                return logs.LogTail.bounded(*last_lines(), request_id)
            case kv_disk.FindKv() | kv_disk.RestoreKv() | kv_disk.SaveKv():
                return await self._kv_done(request)

    async def _kv_done(self, request: kv_disk.FindKv | kv_disk.RestoreKv | kv_disk.SaveKv) -> kv_disk.KvDone:
        worker = self._session.worker
        if worker.kv_disk is None:
            raise ProtocolError(
                "the coordinator requested KV memory on disk, but this worker was started without kv_disk"
            )
        return await worker.kv_disk.answer(request, worker.service.stage(request.epoch).runner)

    async def _measured(self, request: profiles.ProfileWorker) -> profiles.WorkerProfile:
        progress = Progress(what="measurement")
        self._measuring.add(progress)
        try:
            async with self._exclusive:
                return await progress.in_thread(partial(self._profile, request, progress))
        finally:
            self._measuring.discard(progress)

    def _profile(self, request: profiles.ProfileWorker, progress: Progress) -> profiles.WorkerProfile:
        worker, before_bytes = self._session.worker, resident_bytes()
        try:
            path = request.model_path
            file = worker.weights.open_file(path, request.model_id) if path else None
            model = None if file is None else Model(file)
        except ModelFileError:  # The load of the file's layers will report this error.
            model = None
        with model or nullcontext():
            profile = worker.device.measure(model, request.quant_types, progress.add)
        del model
        release_freed_memory()
        return profiles.WorkerProfile(profile, request.request_id, max(0, resident_bytes() - before_bytes))

    async def _profile_link(self, end: profiles.LinkEnd) -> profiles.LinkProfile:
        peer = self._session.peer(end.address, end.worker)
        try:
            profile = await measure_link(peer, end.permit)
            return replace(profile, network_s=await network_round_trip(end.link_address))
        except WorkerError as error:
            raise WorkerError(f"no connection to worker {end.worker} at {end.address}: {error}") from error
        finally:
            await peer.close()

    async def _find_weights(self, request: weights.FindWeights) -> weights.WeightsFound:
        async def progressed(done_bytes: int, total_bytes: int) -> None:
            await self._session.send(weights.FindWeightsProgress(done_bytes, total_bytes))

        progress = Progress(progressed)
        finding = asyncio.to_thread(self._session.worker.weights.locate, request, progress)
        return replace(await progress.during(finding, _REPORT_S), request_id=request.request_id)

    async def _probe(self, request: messages.ProbePeer) -> messages.ProbeResult:
        """Tests the link to a worker with a new connection, because an open connection may outlast the link."""
        peer = self._session.peer(request.address, request.worker)
        reason = ""
        try:
            await try_link(peer, self._session.deadlines.peer_s, request.permit)
        except LlamaclustError as error:
            reason = str(error)
        finally:
            await peer.close()
        return messages.ProbeResult(request.worker, reason, request.request_id)
