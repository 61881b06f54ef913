from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from runner.case import Case, Group, Measures, Variant, option
from runner.llama import check_program
from runner.models import TYPES
from runner.options import chosen, listed, natural, positive
from runner.vision_shapes import VISION_SHAPES, write_vision_shape

from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.projectors.projector import Projector, open_projector
from llamaclust.model.projectors.tiles import TileReader
from llamaclust.model.quant_types import QuantType
from support.models.vision.encoded_tiles import batch_of_tile, limits_of

_NAMES = {name: name for name in VISION_SHAPES}
_HOW = "the docstring of tests/support/models/vision/record_mtmd.py"


@dataclass(frozen=True)
class Encode(Case):
    """Compares the speed of image encoders with llama.cpp's mtmd, for one tile of an image of 1024 x 768 pixels.
    A ratio above 1 means that llamaclust is faster. tests/support/models/vision/record_mtmd.py says how to build the
    program that runs mtmd. Weights are random and have the types of published files."""

    rounds = 3
    shapes: tuple[str, ...] = option(tuple(_NAMES), "image encoders to measure", listed(chosen("shape", _NAMES)))
    type: QuantType | None = option(None, "type of all matrices (default: the published type)", chosen("type", TYPES))
    layers: int = option(0, "number of layers of each encoder (0: all)", natural)
    threads: int = option(2, "number of threads of each program", positive)
    encode_tile: Path | None = option(None, "path of the program encode_tile, which runs mtmd", Path)

    async def groups(self) -> AsyncIterator[Group]:
        program = None if self.encode_tile is None else check_program(self.encode_tile, _HOW, "--encode-tile")
        for name in self.shapes:
            shape = VISION_SHAPES[name]
            quant_type = self.type or shape.quant_type
            layers = min(self.layers or shape.layers, shape.layers)
            with TemporaryDirectory(prefix="llamaclust-") as folder:
                path = Path(folder) / "mmproj.gguf"
                write_vision_shape(path, shape, quant_type, layers)
                tile = np.random.default_rng(2).integers(0, 256, (*shape.tile, 3), np.uint8)
                title = f"{name} {quant_type.name}, {layers} of {shape.layers} layers, 1 of {shape.tiles} tiles"
                async with _variants(program, path, tile, self.threads) as variants:
                    yield Group(title, variants, {"patches/s": "1.5"} if program else {})


@asynccontextmanager
async def _variants(
    program: Path | None, path: Path, tile: NDArray[np.uint8], threads: int
) -> AsyncIterator[dict[str, Variant]]:
    projector = open_projector(path)
    with _ours(projector, tile, threads) as ours:
        if program is None:
            yield {"llamaclust": ours}
            return
        async with _theirs(program, projector, tile, threads) as theirs:
            yield {"mtmd": theirs, "llamaclust": ours}


def _speed(tile: NDArray[np.uint8], projector: Projector, seconds: float) -> Measures:
    patches = tile.shape[0] * tile.shape[1] / projector.patch_size**2
    return {"ms": 1e3 * seconds, "patches/s": patches / seconds}


@contextmanager
def _ours(projector: Projector, tile: NDArray[np.uint8], threads: int) -> Iterator[Variant]:
    reader = TileReader(projector)
    limits = limits_of(reader.inputs(tile))
    stage = CpuBackend(threads).load(projector.program, projector.tensors, limits, lambda done_bytes: None)

    def encode() -> float:
        begun_s = perf_counter()
        inputs = reader.inputs(tile)
        inputs.in_lines(stage.run(batch_of_tile(inputs), inputs.patches))
        return perf_counter() - begun_s

    async def measure(turn: int) -> Measures:
        return _speed(tile, projector, await asyncio.to_thread(encode))

    try:
        yield measure
    finally:
        stage.close()


@asynccontextmanager
async def _theirs(program: Path, projector: Projector, tile: NDArray[np.uint8], threads: int) -> AsyncIterator[Variant]:
    path = projector.file.path
    pixels, rows = path.with_name("tile"), path.with_name("rows")
    pixels.write_bytes(tile.tobytes())
    height, width, _ = tile.shape
    words = (str(program), str(path), str(pixels), str(width), str(height), str(threads), "fast", str(rows))
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, stderr=null)
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    async def measure(turn: int) -> Measures:
        requests.write(b"\n")
        line = await answers.readline()
        if not line:
            raise LlamaclustError(f"{program} ended with exit status {await process.wait()} and no output")
        return _speed(tile, projector, 1e-3 * float(line))

    try:
        yield measure
    finally:
        requests.close()
        await process.wait()
