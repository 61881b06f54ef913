"""A worker's weights of models: files, and tensors fetched from others. It gives both to other workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from llamaclust.core.errors import LoadCancelledError, ModelFileError
from llamaclust.model.adapters import adapted_identity, is_adapter, read_adapter, with_adapters
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.file_manifests import FileManifest, FileManifests
from llamaclust.model.weights.manifest import MANIFEST_VERSION
from llamaclust.wire.control.messages import AddWeightSource, FindWeights, WeightsFound, WeightSource
from llamaclust.wire.rpc.client import Peer
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.weights.giver import WeightGiver

if TYPE_CHECKING:
    from llamaclust.worker.weights.remote_model import RemoteModel

_log = logging.getLogger(__name__)

_Value = TypeVar("_Value")


class Progress:
    """Bytes that several threads have done, of a total; reported by the event loop."""

    def __init__(self) -> None:
        self.total_bytes = 0  # 0: not known yet
        self.done_bytes = 0
        self.weight_bytes = 0  # of a load, as reported for all of that; 0: the total is
        self._is_cancelled = False
        self._lock = Lock()

    def cancel(self) -> None:
        """Whatever reports progress from now on ends with LoadCancelledError."""
        self._is_cancelled = True

    def add(self, n_bytes: int) -> None:
        if self._is_cancelled:
            raise LoadCancelledError("the load was cancelled")
        with self._lock:
            self.done_bytes += n_bytes

    async def during(
        self, work: Coroutine[None, None, _Value], report: Callable[[int, int], Awaitable[None]], every_s: float
    ) -> _Value:
        """What `work` returns; meanwhile `report` is called with the bytes done and the total."""
        working = asyncio.create_task(work)
        try:
            while not (await asyncio.wait((working,), timeout=every_s))[0]:
                await report(self.done_bytes, self.total_bytes)
        finally:
            working.cancel()
            await asyncio.wait((working,))
        return working.result()


Reach = Callable[[WeightSource], Peer]
"""A channel to a source."""


class Weights:
    """Of one worker. Without a `cache` it neither fetches nor gives any."""

    def __init__(
        self, cache: WeightCache | None = None, model_dir: Path | None = None, models_dir: Path | None = None
    ) -> None:
        """`model_dir`: where files are that are not where the coordinator has them. `models_dir`: where downloaded ones
        are, each in a folder of its own."""
        self.cache = cache
        self.received_bytes = 0
        self._model_dir = model_dir
        self._models_dir = models_dir
        self.giver = WeightGiver(cache)
        self._manifests = FileManifests(cache)
        self.fetching: list[RemoteModel] = []  # which new sources are reported to

    def add_source(self, update: AddWeightSource, reach: Reach) -> None:
        for model in self.fetching:
            if model.known.manifest == update.manifest:
                model.renew(update.source, reach(update.source))

    def open_file(self, model_path: str, model_id: str, adapter_paths: Sequence[str] = ()) -> Model | None:
        """The file of that identity with its adapters by their numbers, each at its path or under its name in
        `model_dir` ("": no adapter has the number); None where one of them is not there. Reads headers and samples, not
        the adapters' weights, which the coordinator checked. ModelFileError where there are only others."""
        there = [[place for place in self.places(model_path) if place.is_file()]]
        given = [path for path in adapter_paths if path]
        there += [[place for place in self.places(path) if is_adapter(place)] for path in given]
        if not all(there):
            return None
        for model in _readable(open_model, there[0]):
            adapters = [_readable(partial(read_adapter, model=model), places) for places in there[1:]]
            for chosen in product(*adapters):
                found = iter(chosen)
                numbered = [next(found) if path else None for path in adapter_paths]
                if adapted_identity(model, numbered) == model_id:
                    paths = [None if adapter is None else adapter.path for adapter in numbered]
                    return Model(with_adapters(model, numbered), adapter_paths=paths)
        files = ", ".join(str(place) for places in there for place in places)
        which = "file that the coordinator opened: it" if len(there) == 1 else "files that the coordinator opened: one"
        raise ModelFileError(
            f"{files}: not the {which} was changed or replaced; restore it, or start the cluster again"
        )

    def places(self, model_path: str) -> list[Path]:
        """Where the file is looked for."""
        path = Path(model_path)
        own = [] if self._model_dir is None else [self._model_dir / path.name]
        downloaded = [place for place in _downloaded(self._models_dir, path.name) if place.is_file()]
        return [*dict.fromkeys((path, *own, *downloaded))]

    def locate(self, wanted: FindWeights, progress: Progress | None = None) -> WeightsFound:
        """What is there of a model. Makes the file's manifest where that is asked for, which reads all of the file:
        `progress` counts that."""
        try:
            model = self.open_file(wanted.model_path, wanted.model_id, wanted.adapter_paths)
        except ModelFileError as error:
            _log.warning("%s", error)
            model = None
        if model is None:
            return self._in_cache(wanted.model_id)
        with model:
            copy_id = model.file.copy_id
            if not wanted.describe:
                return WeightsFound(True, file=copy_id)
            manifest = self.manifest_of(model, progress or Progress())
            if self.giver.gives:
                self.giver.add(model.file, manifest.content)
            return WeightsFound(True, manifest.content, manifest.n_bytes, gives=self.giver.gives, file=copy_id)

    def manifest_of(self, model: Model, progress: Progress) -> FileManifest:
        """Returns the manifest of the file as it is now; see `FileManifests.of`."""

        def begin(total_bytes: int) -> None:
            progress.done_bytes, progress.total_bytes = 0, total_bytes

        return self._manifests.of(model.file, begin, progress.add)

    def version_of(self, model_path: str, model_id: str, adapter_paths: Sequence[str]) -> str | None:
        """The version of the file that `open_file` opens; None where there is none."""
        try:
            model = self.open_file(model_path, model_id, adapter_paths)
        except ModelFileError:
            return None
        return None if model is None else model.file.version

    def _in_cache(self, model_id: str) -> WeightsFound:
        content = None if self.cache is None else self.cache.known_manifest(key_of(model_id))
        if self.cache is None or content is None:
            return WeightsFound(False)
        return WeightsFound(False, content, self.cache.place(content).stat().st_size, gives=True)


def _downloaded(models_dir: Path | None, name: str) -> list[Path]:
    """Places of a file of that name among downloaded models."""
    try:
        folders = [] if models_dir is None else sorted(models_dir.iterdir())
    except OSError:  # nothing was downloaded
        return []
    return [folder / name for folder in folders]


def _readable(read: Callable[[Path], _Value], places: Sequence[Path]) -> list[_Value]:
    """What is read of these files, without damaged ones. ModelFileError where all are."""
    found: list[_Value] = []
    errors: list[ModelFileError] = []
    for place in places:
        try:
            found.append(read(place))
        except ModelFileError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def weight_cache(settings: WorkerSettings) -> WeightCache | None:
    """The one that a worker is started with."""
    return None if settings.weights_dir is None else WeightCache(settings.weights_dir, settings.weights_bytes)


def key_of(model_id: str) -> str:
    """By what a model's manifest is remembered where its file is not."""
    return sha256(f"model {model_id}, manifest {MANIFEST_VERSION}".encode()).hexdigest()
