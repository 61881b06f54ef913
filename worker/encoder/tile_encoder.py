"""A loaded image encoder, which computes the rows of one tile at a time. It does not use the network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import RequestError
from llamaclust.kernels.backend import Backend, Batch, Float32, Progress
from llamaclust.model.projectors.projector import Projector
from llamaclust.model.projectors.tiles import EncoderInputs, TileReader
from llamaclust.worker.devices.encoder_limits import EncoderMemory, encoder_limits


class TileEncoder:
    """A loaded image encoder with its planned `memory`. `manifest` is None if the file's SHA-256 was not checked."""

    def __init__(
        self, backend: Backend, projector: Projector, memory: EncoderMemory, manifest: str | None, progress: Progress
    ) -> None:
        self.projector = projector
        self.manifest = manifest
        self.memory = memory
        self._reader = TileReader(projector)
        self._limits = encoder_limits(projector)
        self._stage = backend.load(projector.program, projector.tensors, self._limits, progress)

    @property
    def file_id(self) -> str:
        return self.projector.identity

    @property
    def file_version(self) -> str:
        return self.projector.file.version

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the planned workspace that the encoder has not allocated yet."""
        return self.memory.workspace_bytes - self._stage.workspace_bytes

    @property
    def weights(self) -> object:
        return self._stage.weights

    def rows(self, tile: NDArray[np.uint8]) -> Float32:
        """Returns a tile's rows for the text model, [rows, levels * width] as in `Projector`. `tile` is [height, width,
        3]. Raises RequestError if the encoder does not accept this size, or if a number is not finite."""
        inputs = self._reader.inputs(tile)
        rows = inputs.in_lines(self._stage.run(self._batch(inputs), inputs.patches))
        if not np.isfinite(rows).all():
            text = f"the encoder's numbers for a tile of {tile.shape[1]} x {tile.shape[0]} pixels are not finite"
            raise RequestError(f"{text}; the projector {self.projector.file.path.name} may be damaged")
        return rows

    def _batch(self, inputs: EncoderInputs) -> Batch:
        rows, blocks = len(inputs.patches), self._limits.kv_blocks
        return Batch(
            tokens=np.zeros(rows, np.int32),
            positions=np.arange(rows, dtype=np.int32),
            sequence_starts=np.array([0, rows], np.int32),
            table_starts=np.array([0, blocks], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32),
            output_rows=np.empty(0, np.int32),
            rope_positions=inputs.rope_positions,
            groups=inputs.groups,
        )

    def close(self) -> None:
        self._stage.close()
