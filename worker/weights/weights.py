"""A worker's model files and fetched tensors, which it also sends to other workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from llamaclust.core.errors import LoadCancelledError, ModelFileError
from llamaclust.model.adapters import is_adapter, read_adapter
from llamaclust.model.architectures import as_programs_read
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.file_manifests import FileManifest, FileManifests
from llamaclust.model.weights.manifest import MANIFEST_VERSION
from llamaclust.wire.control.weights import (
    AdapterFile,
    AddWeightSource,
    EncoderFile,
    FindWeights,
    WeightsFound,
    WeightSource,
)
from llamaclust.wire.rpc.client import Peer
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.weights.giver import WeightGiver

if TYPE_CHECKING:
    from llamaclust.worker.weights.remote_file import RemoteFile

_log = logging.getLogger(__name__)

_Value = TypeVar("_Value")
Report = Callable[[int, int], Awaitable[None]]
"""A callback with the numbers of finished bytes and of total bytes."""


class Progress:
    """Counts finished bytes of consecutive parts. Any thread may call `begin`, `add` and `cancel`."""

    def __init__(self, report: Report | None = None, what: str = "load") -> None:
        self._report = report
        self._what = what
        self._earlier_bytes = 0  # Reported total of the parts before the present one.
        self._total_bytes = 0  # 0 until the first part begins.
        self._done_bytes = 0
        self._weight_bytes = 0
        self._is_cancelled = False
        self._lock = Lock()

    def cancel(self) -> None:
        self._is_cancelled = True

    def begin(self, total_bytes: int, weight_bytes: int | None = None) -> None:
        """Begins a part of `total_bytes`. If `weight_bytes` is given, the part counts as `weight_bytes` in reports."""
        with self._lock:
            self._earlier_bytes += self._weight_bytes
            self._done_bytes, self._total_bytes = 0, total_bytes
            self._weight_bytes = total_bytes if weight_bytes is None else weight_bytes

    def add(self, n_bytes: int) -> None:
        if self._is_cancelled:
            raise LoadCancelledError(f"the {self._what} was cancelled")
        with self._lock:
            self._done_bytes += n_bytes

    @property
    def reported(self) -> tuple[int, int]:
        """Finished bytes and total bytes of all parts that have begun. Finished bytes never decrease."""
        with self._lock:
            done_bytes = min(self._done_bytes, self._total_bytes) * self._weight_bytes // max(1, self._total_bytes)
            return self._earlier_bytes + done_bytes, self._earlier_bytes + self._weight_bytes

    async def in_thread(self, work: Callable[[], _Value]) -> _Value:
        """Runs `work` on a thread. Waits for the thread even if cancelled, because the thread holds memory."""
        running = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise

    async def during(self, work: Coroutine[None, None, _Value], every_s: float) -> _Value:
        """Awaits `work` and returns its result. Meanwhile, reports the progress every `every_s` seconds."""
        working = asyncio.create_task(work)
        try:
            while not (await asyncio.wait((working,), timeout=every_s))[0]:
                done_bytes, total_bytes = self.reported
                if total_bytes and self._report is not None:
                    await self._report(done_bytes, total_bytes)
        finally:
            if not working.done():
                self.cancel()  # A thread that reads a file does not learn of the task's cancellation.
            working.cancel()
            await asyncio.wait((working,))
        return working.result()


Reach = Callable[[WeightSource], Peer]


class Weights:
    """The weights of one worker. Without a `cache`, weights are neither fetched nor sent."""

    def __init__(
        self, cache: WeightCache | None = None, model_dir: Path | None = None, models_dir: Path | None = None
    ) -> None:
        """`model_dir` has model files by name, and `models_dir` has one folder for each downloaded model."""
        self.cache = cache
        self.received_bytes = 0
        self._model_dir = model_dir
        self._models_dir = models_dir
        self.giver = WeightGiver(cache)
        self._manifests = FileManifests(cache)
        # Files in the process of being fetched, to which new sources are reported.
        self.fetching: list[RemoteFile] = []

    def add_source(self, update: AddWeightSource, reach: Reach) -> None:
        for file in self.fetching:
            if file.known.manifest == update.manifest:
                file.renew(update.source, reach(update.source))

    def open_file(self, model_path: str, model_id: str) -> ModelFile | None:
        """Opens the model's file, or returns None if there is none. Raises ModelFileError for files of other models."""
        places = [place for place in self.places(model_path) if place.is_file()]
        return _chosen(lambda place: as_programs_read(open_model(place)), places, model_id)

    def open_adapter(self, wanted: AdapterFile, plain: ModelFile) -> ModelFile | None:
        """Opens a LoRA adapter like `open_file`. Reads only the header, and the first and last bytes of each tensor."""
        places = [place for place in self.places(wanted.path) if is_adapter(place)]
        return _chosen(partial(read_adapter, model=plain), places, wanted.adapter_id)

    def open_projector_file(self, wanted: EncoderFile) -> ModelFile | None:
        return _chosen(open_model, [place for place in self.places(wanted.path) if place.is_file()], wanted.file_id)

    def places(self, model_path: str) -> list[Path]:
        path = Path(model_path)
        own = [] if self._model_dir is None else [self._model_dir / path.name]
        downloaded = [place for place in _downloaded(self._models_dir, path.name) if place.is_file()]
        return [*dict.fromkeys((path, *own, *downloaded))]

    def locate(self, wanted: FindWeights, progress: Progress | None = None) -> WeightsFound:
        """Finds weights on this machine. Reads the whole file if its manifest is requested. `progress` counts bytes."""
        try:
            file = self._wanted(wanted)
        except ModelFileError as error:
            _log.warning("%s", error)
            file = None
        if file is None:
            return self._in_cache(wanted.file_id)
        if not wanted.describe:
            return WeightsFound(True, file=file.copy_id)
        manifest = self.manifest_of(file, progress or Progress())
        if self.giver.gives:
            self.giver.add(file, manifest.content)
        return WeightsFound(True, manifest.content, manifest.n_bytes, gives=self.giver.gives, file=file.copy_id)

    def _wanted(self, wanted: FindWeights) -> ModelFile | None:
        if wanted.encoder is not None:
            return self.open_projector_file(wanted.encoder)
        plain = self.open_file(wanted.model_path, wanted.model_id)
        return plain if plain is None or wanted.adapter is None else self.open_adapter(wanted.adapter, plain)

    def manifest_of(self, file: ModelFile, progress: Progress) -> FileManifest:
        return self._manifests.of(file, progress.begin, progress.add)

    def version_of(self, wanted: FindWeights) -> str | None:
        try:
            file = self._wanted(wanted)
        except ModelFileError:
            return None
        return None if file is None else file.version

    def _in_cache(self, file_id: str) -> WeightsFound:
        content = None if self.cache is None else self.cache.known_manifest(key_of(file_id))
        if self.cache is None or content is None:
            return WeightsFound(False)
        return WeightsFound(False, content, self.cache.place(content).stat().st_size, gives=True)


def _downloaded(models_dir: Path | None, name: str) -> list[Path]:
    try:
        folders = [] if models_dir is None else sorted(models_dir.iterdir())
    except OSError:  # Nothing was downloaded.
        return []
    return [folder / name for folder in folders]


def _chosen(read: Callable[[Path], ModelFile], places: Sequence[Path], identity: str) -> ModelFile | None:
    errors: list[ModelFileError] = []
    for place in places:
        try:
            if (file := read(place)).identity == identity:
                return file
        except ModelFileError as error:
            errors.append(error)
    if not places:
        return None
    if len(errors) == len(places):
        raise errors[0]
    what = "this is not the file that the coordinator opened: it was changed or replaced"
    raise ModelFileError(f"{', '.join(map(str, places))}: {what}; restore it, or start the cluster again")


def weight_cache(settings: WorkerSettings) -> WeightCache | None:
    return None if settings.weights_dir is None else WeightCache(settings.weights_dir, settings.weights_bytes)


def key_of(file_id: str) -> str:
    return sha256(f"model {file_id}, manifest {MANIFEST_VERSION}".encode()).hexdigest()
