"""Tests of a worker's own adapter files: which are opened, and that opening does not read all weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.loader import Model
from llamaclust.wire.control.weights import AdapterFile
from llamaclust.worker.weights.weights import Weights
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model

NAMES = ("first.gguf", "second.gguf")


@dataclass(frozen=True, slots=True)
class Places:
    """The coordinator's folder, in which a worker may have other files, and the worker's `--model-dir` with the right
    files."""

    theirs: Path
    own: Path
    opened: Model

    def open(self) -> list[ModelFile | None]:
        """Opens the model and its adapters."""
        weights, model = Weights(model_dir=self.own), self.opened
        wanted = [
            AdapterFile(number, str(self.theirs / name), model.adapter_digests[number])
            for number, name in enumerate(NAMES)
        ]
        plain = weights.open_file(str(self.theirs / "m.gguf"), model.model_id)
        assert plain is not None
        return [plain, *(weights.open_adapter(adapter, plain) for adapter in wanted)]

    def paths(self) -> list[Path | None]:
        return [None if file is None else file.path for file in self.open()]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    theirs.mkdir()
    own.mkdir()
    model = build_tiny_model(own / "m.gguf", hidden=64, heads=2, kv_heads=1, ffn=96, layers=2)
    adapters = [build_adapter(own / name, model, rank=64, seed=seed) for seed, name in enumerate(NAMES)]
    return Places(theirs, own, Model.open(model, adapters=adapters))


def test_a_stale_file_at_the_first_place_hides_no_right_one(places: Places) -> None:
    shutil.copy(places.own / "second.gguf", places.theirs / "first.gguf")
    (places.theirs / "second.gguf").write_bytes(b"GGUF, cut short")
    (places.theirs / "m.gguf").write_bytes(b"")
    assert places.paths() == [places.own / name for name in ("m.gguf", *NAMES)]


def test_each_adapter_may_be_at_another_place(places: Places) -> None:
    (places.own / "first.gguf").rename(places.theirs / "first.gguf")
    assert places.paths() == [places.own / "m.gguf", places.theirs / "first.gguf", places.own / "second.gguf"]
    (places.own / "second.gguf").unlink()
    assert places.paths()[2] is None


def test_the_error_names_the_file_that_is_another(places: Places) -> None:
    shutil.copy(places.own / "second.gguf", places.own / "first.gguf")
    with pytest.raises(ModelFileError) as caught:
        places.open()
    assert str(caught.value).startswith(
        f"{places.own / 'first.gguf'}: this is not the file that the coordinator opened"
    )


def test_opening_reads_samples_of_adapters_alone(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load opens the files again before it can report progress."""
    read_bytes = 0

    def counted(tensor: Tensor, buffer: bytearray | memoryview, start: int = 0) -> None:
        nonlocal read_bytes
        read_bytes += len(buffer)
        read_into(tensor, buffer, start)

    read_into = Tensor.read_into
    monkeypatch.setattr(Tensor, "read_into", counted)
    _, *adapters = places.open()
    weights = [tensor for adapter in adapters if adapter is not None for tensor in adapter.tensors.values()]
    assert 0 < read_bytes <= len(weights) * 2 * 4096 < sum(tensor.n_bytes for tensor in weights)
