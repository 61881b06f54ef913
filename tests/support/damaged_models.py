"""Damages model files without changing the model id."""

from __future__ import annotations

from pathlib import Path

from llamaclust.model.gguf.model_file import open_model


def flip_middle(path: Path, tensor: str) -> None:
    """Changes weights in the middle of a tensor in the file. The model id stays the same. A second call restores the
    weights."""
    model = open_model(path)
    found = model.tensor(tensor)
    with path.open("r+b") as file:
        file.seek(found.offset + found.n_bytes // 2)
        data = bytearray(file.read(min(64, found.n_bytes // 4)))
        data[1::2] = bytes(byte ^ 0x30 for byte in data[1::2])
        file.seek(found.offset + found.n_bytes // 2)
        file.write(data)
    assert open_model(path).identity == model.identity, "a sample was hit"
