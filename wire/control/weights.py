"""Control messages about the weights of models, adapters and image projectors, and about where workers find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import Address, Digest, Integer, ModelId, ModelPath, Size, WorkerName, bounded
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_ADAPTERS


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A process that may have weights: a worker at `address`, or the coordinator that the receiver has joined."""

    address: Address = ""
    worker: WorkerName | None = None  # None for the coordinator.


@dataclass(frozen=True, slots=True)
class WeightSources:
    manifest: Digest
    manifest_bytes: Annotated[int, Integer(1, 1 << 26)]
    sources: Annotated[tuple[WeightSource, ...], Size(0, 256)]  # The best source comes first.


@dataclass(frozen=True, slots=True)
class AddWeightSource:
    """Announces a new source of a manifest's weights, or a source's new address, while loads fetch these weights."""

    manifest: Digest
    source: WeightSource


@dataclass(frozen=True, slots=True)
class AdapterFile:
    number: Annotated[int, Integer(0, MAX_ADAPTERS - 1)]
    path: ModelPath  # Path on the coordinator's machine.
    adapter_id: ModelId
    weights: WeightSources | None = None  # None if the file must be on the worker's machine.


AdapterFiles = Annotated[tuple[AdapterFile, ...], Size(0, MAX_ADAPTERS)]


@dataclass(frozen=True, slots=True)
class EncoderFile:
    path: ModelPath  # Path on the coordinator's machine.
    file_id: ModelId
    weights: WeightSources | None = None  # None if the file must be on the worker's machine.


@dataclass(frozen=True, slots=True)
class FindWeights:
    model_path: ModelPath
    model_id: ModelId
    describe: bool = False  # True to make the manifest if there is none yet.
    request_id: int = 0
    adapter: AdapterFile | None = None
    encoder: EncoderFile | None = None  # If `adapter` and `encoder` are None, the model file is looked for.

    def check(self) -> None:
        if self.adapter is not None and self.encoder is not None:
            raise ProtocolError("FindWeights names both an adapter and an encoder; expected one of them")

    @property
    def file_id(self) -> str:
        if self.encoder is not None:
            return self.encoder.file_id
        return self.model_id if self.adapter is None else self.adapter.adapter_id

    @property
    def path(self) -> str:
        if self.encoder is not None:
            return self.encoder.path
        return self.model_path if self.adapter is None else self.adapter.path


@dataclass(frozen=True, slots=True)
class WeightsFound:
    has_file: bool
    manifest: Digest | None = None  # SHA-256 of the manifest that the worker has, or None if it has none.
    manifest_bytes: Annotated[int, Integer(0, 1 << 26)] = 0
    request_id: int = 0
    gives: bool = False  # True if the worker can send the manifest and its tensors.
    file: Digest | None = None  # Identifies the file and its present version.

    def check(self) -> None:
        bounded("manifest_bytes", self.manifest_bytes, int(self.manifest is not None), 1 << 26)


@dataclass(frozen=True, slots=True)
class FindWeightsProgress:
    done_bytes: int
    total_bytes: int

    def check(self) -> None:
        bounded("done_bytes", self.done_bytes, 0, self.total_bytes)


@dataclass(frozen=True, slots=True)
class SetAdapters:
    epoch: int
    adapters: AdapterFiles = ()
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class AdaptersSet:
    weight_bytes: int
    workspace_bytes: int
    request_id: int = 0
