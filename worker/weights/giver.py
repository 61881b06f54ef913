"""Sends weights, by SHA-256 and in pieces, to workers without the model's file. Takes them from files or the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from llamaclust.core.errors import LlamaclustError, ModelFileError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor, open_regular, read_exactly
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.manifest import read_manifest
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import FETCH
from llamaclust.wire.rpc.server import Handler, ServerStream
from llamaclust.wire.weight_stream import FRAME_BYTES, WeightRange, decode_range, encode_missing, frames_of

_PIECE_FRAMES = 8
_HELD_FRAMES = 1024  # 256 MiB. Pieces are smaller if pieces of all streams would be larger together.
_IDLE_S = 120.0
_FRAME_S = 30.0


class WeightGiver:
    """The Weights service of a process. It holds at most one piece of a file in memory per stream."""

    def __init__(self, cache: WeightCache | None) -> None:
        self.sent_bytes = 0
        self._giving = 0  # Number of ranges that are being sent.
        self._cache = cache
        self._tensors: dict[str, Tensor] = {}  # Tensors of files, by SHA-256.

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {FETCH: self._serve}

    @property
    def gives(self) -> bool:
        return self._cache is not None

    def add(self, file: ModelFile, manifest: str) -> None:
        """Offers a file's tensors to other workers. The cache must contain the manifest with SHA-256 `manifest`."""
        assert self._cache is not None
        for record in read_manifest(self._cache.place(manifest)).tensors:
            self._tensors[record.content] = file.tensor(record.name)

    async def _serve(self, stream: ServerStream) -> None:
        await stream.accept()
        while True:
            async with deadline("a request for the next range of weights", _IDLE_S):
                data = await stream.read()
            if data is None:
                return
            self._giving += 1
            try:
                await self._give(stream, decode_range(data))
            finally:
                self._giving -= 1

    async def _give(self, stream: ServerStream, wanted: WeightRange) -> None:
        start = wanted.start
        while start < wanted.end:
            end = min(start + self._piece_bytes, wanted.end)
            try:
                data = await asyncio.to_thread(self._read, wanted.content, start, end)
            except LlamaclustError as error:
                await _write(stream, encode_missing(str(error)))
                return
            for frame in frames_of(memoryview(data)):
                await _write(stream, frame)
                self.sent_bytes += len(frame) - 1
            start = end

    @property
    def _piece_bytes(self) -> int:
        return FRAME_BYTES * min(_PIECE_FRAMES, _HELD_FRAMES // max(1, self._giving))

    def _read(self, content: str, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        tensor = self._tensors.get(content)
        if tensor is not None:
            _check_end(content, end, tensor.n_bytes)
            try:
                tensor.read_into(data, start)
                return data
            except ModelFileError:  # The file was moved or changed. The cache may have the weights.
                if self._cache is None or self._cache.find(content) is None:
                    raise
                self._tensors.pop(content, None)
        found = None if self._cache is None else self._cache.find(content)
        if self._cache is None or found is None:
            raise ModelFileError(f"this worker has no weights with SHA-256 {content}")
        _check_end(content, end, found.size_bytes)
        path = self._cache.place(content)
        with open_regular(path) as descriptor:
            read_exactly(descriptor, path, start, memoryview(data))
        return data


def _check_end(content: str, end: int, n_bytes: int) -> None:
    if end > n_bytes:
        raise ModelFileError(f"weights with SHA-256 {content} have {n_bytes} bytes, but the request ends at byte {end}")


async def _write(stream: ServerStream, frame: bytes) -> None:
    async with deadline("sending weights", _FRAME_S):
        await stream.write(frame)
