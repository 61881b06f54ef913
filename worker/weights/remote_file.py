"""A model or adapter file on other machines. Fetches and checks the tensors that a stage needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from llamaclust.core.errors import LlamaclustError, ModelFileError
from llamaclust.model.architectures.tensors import FACTOR_TENSORS
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import FileIdentity
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.manifest import Manifest, read_manifest
from llamaclust.wire.control.weights import WeightSource, WeightSources
from llamaclust.wire.rpc.client import Peer
from llamaclust.worker.weights.fetch import WantedWeights, WeightFetch, in_thread
from llamaclust.worker.weights.weights import Weights, key_of


class RemoteFile:
    """A model file on other machines. Its weights are fetched into the cache. Raises LlamaclustError if there is no
    cache."""

    def __init__(
        self,
        path: str,
        identity: str,
        known: WeightSources,
        weights: Weights,
        sources: Mapping[str | None, Peer],
        on_bytes: Callable[[int], None],
    ) -> None:
        """`path` appears in messages. `sources` has peers by worker name (None: the coordinator), the best first."""
        if weights.cache is None:
            raise LlamaclustError(
                f"{path}: there is no such file on this machine, and LLAMACLUST_WEIGHTS_SIZE=0 forbids fetching it"
            )
        self._cache: WeightCache = weights.cache
        self._path = Path(path)
        self._identity = identity
        self.known = known
        self._weights = weights
        self._sources = dict(sources)
        self._left: list[Peer] = []  # Former peers of sources whose address has changed.
        self._fetch_now: WeightFetch | None = None
        self._on_bytes = on_bytes
        self._manifest: Manifest | None = None
        self._stack = ExitStack()

    async def __aenter__(self) -> Self:
        with ExitStack() as stack:  # Closes the cache's lease if the wait for it is cancelled.
            await in_thread(stack.enter_context, self._cache.in_use())
            self._weights.fetching.append(self)
            stack.callback(self._weights.fetching.remove, self)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stack.close()
        peers = (*self._sources.values(), *self._left)
        await asyncio.gather(*(peer.close() for peer in peers), return_exceptions=True)

    def renew(self, source: WeightSource, peer: Peer) -> None:
        worker = source.worker
        if worker in self._sources:
            self._left.append(self._sources[worker])
        self._sources[worker] = peer
        if self._fetch_now is not None:
            self._fetch_now.renew(_shown(worker), peer)

    async def outline(self) -> ModelFile:
        content = self.known.manifest
        await self._fetch([WantedWeights(content, self.known.manifest_bytes, f"the manifest of {self._path.name}")])
        manifest = await asyncio.to_thread(read_manifest, self._cache.place(content))
        if manifest.model_id != self._identity:
            raise ModelFileError(
                f"{self._path}: expected the manifest of model {self._identity}, found that of {manifest.model_id}"
            )
        await asyncio.to_thread(self._cache.remember_manifest, key_of(self._identity), content)
        self._manifest = manifest
        await self._fetch(self._wanted(FACTOR_TENSORS))  # Programs contain the values of these tensors.
        return await asyncio.to_thread(self._file)

    def missing_bytes(self, names: Iterable[str]) -> int:
        wanted = {tensor.content: tensor for tensor in self._wanted(names)}
        return self._missing_bytes(self._missing(wanted.values()))

    async def complete(self, names: Iterable[str]) -> ModelFile:
        wanted = self._wanted(names)
        await self._fetch(wanted)
        if await asyncio.to_thread(self._missing, wanted):
            raise LlamaclustError(f"{self._cache.path}: weights were deleted there while they were loaded")
        return await asyncio.to_thread(self._file)

    def _wanted(self, names: Iterable[str]) -> list[WantedWeights]:
        assert self._manifest is not None, "its outline comes first"
        wanted = set(names)
        records = [record for record in self._manifest.tensors if record.name in wanted]
        return [WantedWeights(record.content, record.n_bytes, f"tensor {record.name}") for record in records]

    def _missing(self, wanted: Iterable[WantedWeights]) -> list[WantedWeights]:
        return [weights for weights in wanted if self._cache.find(weights.content) is None]

    def _missing_bytes(self, missing: Iterable[WantedWeights]) -> int:
        return sum(weights.n_bytes - self._cache.part_bytes(weights.content) for weights in missing)

    async def _fetch(self, wanted: Sequence[WantedWeights]) -> None:
        missing = await asyncio.to_thread(self._missing, wanted)
        if missing:
            await asyncio.to_thread(self._cache.make_room, self._missing_bytes(missing))
            sources = [(_shown(worker), peer) for worker, peer in self._sources.items()]
            self._fetch_now = WeightFetch(self._cache, sources, self._count, self._on_bytes)
            try:
                await self._fetch_now.run(missing)
            finally:
                self._fetch_now = None

    def _count(self, n_bytes: int) -> None:
        self._weights.received_bytes += n_bytes
        self._on_bytes(n_bytes)

    def _file(self) -> ModelFile:
        assert self._manifest is not None
        held: dict[str, tuple[Path, FileIdentity]] = {}
        for record in self._manifest.tensors:
            found = self._cache.find(record.content)
            if found is not None:
                held[record.content] = self._cache.place(record.content), found
        return self._manifest.file(self._path, held)


def _shown(worker: str | None) -> str:
    return "the coordinator" if worker is None else f"worker {worker}"
