"""Records results of llama.cpp's library mtmd for tiles of `tiny_projectors` in data/mtmd: the text model's rows,
float32 [2, rows, channels], little-endian, with the matrices in F32 and then in F16. Run it again after a projector is
added or changed, with its name as an argument (all without one). LLAMA is the folder of llama.cpp's sources, of
the version in llama-cpp-python 0.3.36:

    cmake -S LLAMA -B LLAMA/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF
    cmake --build LLAMA/build --target mtmd -j
    g++ -std=c++17 -O2 -I LLAMA/tools/mtmd -I LLAMA/include -I LLAMA/ggml/include \\
        tests/support/models/llama_cpp/encode_tile.cpp -o encode_tile -fopenmp \\
        -Wl,--start-group $(find LLAMA/build -name 'lib*.a') -Wl,--end-group
    ENCODE_TILE=./encode_tile python tests/support/models/vision/record_mtmd.py NAME ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.architectures.vision.layers import POSITIONS
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.projectors.projector import open_projector
from llamaclust.model.quant_types import QuantType
from support.models.vision.tiny_projectors import HEADS, PATCH, PROJECTORS, WIDTH, build_projector, tile_of
from support.paths import DATA

FOLDER = DATA / "mtmd"
KINDS = (QuantType.F32, QuantType.F16)
_PATCHES = {"qwen2.5vl_merger": (32, 8), "kimivl": (4, 4)}
"""Lines and columns of a tile: two windows, whose side is always 28 in llama.cpp, and as many places as learned
positions, since llama.cpp interpolates otherwise than Moonshot's code."""


def tile_for_mtmd(name: str) -> NDArray[np.uint8]:
    return tile_of(name, patches=_PATCHES.get(name))


def projector_for_mtmd(path: Path, name: str, kind: QuantType) -> Path:
    """Writes a projector without the window size, which llama.cpp does not read, and returns its path."""
    return build_projector(path, name, kind, without=("clip.vision.window_size",))


def mtmd_rows(name: str) -> dict[QuantType, NDArray[np.float32]]:
    """Returns the recorded rows, flattened, for each type of the matrices."""
    found = np.frombuffer((FOLDER / f"{name}.f32").read_bytes(), "<f4")
    return dict(zip(KINDS, found.reshape(2, -1), strict=True))


def _write_for_llama_cpp(path: Path, name: str, kind: QuantType) -> None:
    """Writes the projector so that llama.cpp computes what transformers does: with its keys, the GELU of Gemma 4,
    InternVL's class position last instead of first, Kimi VL's pairs of channels in two halves, and Llama 4's patch
    embedding as a matrix."""
    file = open_model(projector_for_mtmd(path.with_suffix(".plain"), name, kind))
    keys: dict[str, WritableValue] = {"clip.vision.projector.scale_factor": PROJECTORS[name].merge}
    if name == "gemma4v":
        keys["clip.use_gelu"] = True
    sources = [
        TensorSource(tensor.name, tensor.quant_type, _shape(name, tensor), partial(_content, name, tensor))
        for tensor in file.tensors.values()
    ]
    write_gguf(path, {**file.metadata, **keys}, sources)


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    is_matrix = (name, tensor.name) == ("llama4", "v.patch_embd.weight")
    return (WIDTH, 3 * PATCH * PATCH) if is_matrix else tensor.shape


def _content(name: str, tensor: Tensor) -> memoryview:
    rows = np.frombuffer(tensor.read(), np.uint8).reshape(tensor.shape[0], -1)
    if (name, tensor.name) == ("internvl", POSITIONS):
        rows = np.roll(rows, -1, axis=0)
    if name == "kimivl" and (".attn_q." in tensor.name or ".attn_k." in tensor.name):
        pairs = np.arange(WIDTH).reshape(HEADS, -1, 2, 2)  # rotated alternately by the column and the line
        rows = rows[pairs.swapaxes(1, 2).reshape(-1)]
    return np.ascontiguousarray(rows).reshape(-1).data


def _encoded(folder: Path, name: str, kind: QuantType) -> NDArray[np.float32]:
    path, tile = folder / f"{name}.gguf", tile_for_mtmd(name)
    _write_for_llama_cpp(path, name, kind)
    (folder / "tile").write_bytes(tile.tobytes())
    height, width, _ = tile.shape
    null = subprocess.DEVNULL
    words = [os.environ["ENCODE_TILE"], str(path), str(folder / "tile"), str(width), str(height), "1", "exact"]
    subprocess.run([*words, str(folder / "rows")], input=b"\n", stdout=null, stderr=null, check=True)
    projector = open_projector(path)
    lines = height // (projector.patch_size * projector.merge)
    columns = projector.rows_of(height, width) // lines
    channels = projector.width * projector.levels
    rows = np.frombuffer((folder / "rows").read_bytes(), "<f4").reshape(-1, channels)
    if name == "pixtral":  # a break row follows each line but the last
        rows = np.concatenate([rows[line * (columns + 1) :][:columns] for line in range(lines)])
    if name == "llama4":  # column by column, where transformers has line by line
        rows = rows.reshape(columns, lines, channels).swapaxes(0, 1).reshape(-1, channels)
    assert len(rows) == lines * columns and np.isfinite(rows).all() and rows.std() > 0.1, (rows.shape, rows.std())
    return rows


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PROJECTORS:
        with tempfile.TemporaryDirectory() as folder:
            rows = [_encoded(Path(folder), name, kind) for kind in KINDS]
        (FOLDER / f"{name}.f32").write_bytes(b"".join(each.astype("<f4").tobytes() for each in rows))
        print(name, rows[0].shape)


if __name__ == "__main__":
    main()
