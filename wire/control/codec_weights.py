"""Control messages about weights as bytes and back: who has a model's, and whom to ask for them."""

from __future__ import annotations

from llamaclust.core.errors import ProtocolError
from llamaclust.proto import control_pb2 as proto
from llamaclust.wire.bounds import bounded, line, path, worker_name
from llamaclust.wire.control.messages import (
    AddWeightSource,
    FindWeights,
    FindWeightsProgress,
    WeightsFound,
    WeightSource,
    WeightSources,
)

MAX_MANIFEST_BYTES = 1 << 26
MAX_SOURCES = 256


def locate_out(message: FindWeights) -> proto.Locate:
    return proto.Locate(
        model_path=message.model_path,
        model_id=message.model_id,
        describe=message.describe,
        number=message.number,
    )


def locate_in(message: proto.Locate) -> FindWeights:
    model_path = path("model_path", message.model_path)
    return FindWeights(model_path, line("model_id", message.model_id, 128), message.describe, message.number)


def located_out(message: WeightsFound) -> proto.Located:
    manifest = bytes.fromhex(message.manifest or "")
    return proto.Located(
        has_file=message.has_file,
        manifest=manifest,
        manifest_bytes=message.manifest_bytes,
        number=message.number,
    )


def located_in(message: proto.Located) -> WeightsFound:
    if not message.manifest:
        return WeightsFound(message.has_file, number=message.number)
    return WeightsFound(message.has_file, _sha256(message.manifest), _size(message.manifest_bytes), message.number)


def progress_out(message: FindWeightsProgress) -> proto.LocateProgress:
    return proto.LocateProgress(done_bytes=message.done_bytes, total_bytes=message.total_bytes)


def progress_in(message: proto.LocateProgress) -> FindWeightsProgress:
    return FindWeightsProgress(bounded("done_bytes", message.done_bytes, 0, message.total_bytes), message.total_bytes)


def sources_out(message: WeightSources) -> proto.WeightSources:
    return proto.WeightSources(
        manifest=bytes.fromhex(message.manifest),
        manifest_bytes=message.manifest_bytes,
        sources=[_source_out(one) for one in message.sources],
    )


def sources_in(message: proto.WeightSources) -> WeightSources:
    bounded("number of sources", len(message.sources), 0, MAX_SOURCES)
    sources = tuple(map(_source_in, message.sources))
    return WeightSources(_sha256(message.manifest), _size(message.manifest_bytes), sources)


def new_source_out(message: AddWeightSource) -> proto.NewSource:
    return proto.NewSource(manifest=bytes.fromhex(message.manifest), source=_source_out(message.source))


def new_source_in(message: proto.NewSource) -> AddWeightSource:
    return AddWeightSource(_sha256(message.manifest), _source_in(message.source))


def _source_out(source: WeightSource) -> proto.WeightSource:
    return proto.WeightSource(address=source.address, worker=source.worker)


def _source_in(source: proto.WeightSource) -> WeightSource:
    return WeightSource(line("address", source.address, 512), worker_name(source.worker))


def _sha256(value: bytes) -> str:
    if len(value) != 32:
        raise ProtocolError(f"a SHA-256 of {len(value)} bytes")
    return value.hex()


def _size(n_bytes: int) -> int:
    return bounded("manifest_bytes", n_bytes, 1, MAX_MANIFEST_BYTES)
