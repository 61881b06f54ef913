"""Checks that split models are read as one, and that parts which do not belong together are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType

COUNT = 3


def part_name(number: int, count: int = COUNT) -> str:
    return f"model-{number:05}-of-{count:05}.gguf"


def write_part(folder: Path, number: int, *, tensor: str | None = None, **changes: WritableValue | None) -> Path:
    """Writes part `number` (from 1) with one tensor; `changes` sets split keys (dots written __), None removes one."""
    keys: dict[str, WritableValue | None] = {
        "split.no": np.uint16(number - 1),
        "split.count": np.uint16(COUNT),
        "split.tensors.count": np.int32(COUNT),
    }
    if number == 1:
        keys["general.architecture"] = "llama"
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    data = np.full(8, number, np.float32)
    source = TensorSource(tensor or f"blk.{number}.weight", QuantType.F32, (8,), data.tobytes)
    path = folder / part_name(number)
    write_gguf(path, {key: value for key, value in keys.items() if value is not None}, [source])
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    paths = [write_part(tmp_path, number) for number in range(1, COUNT + 1)]
    return paths[0]


def test_parts_are_read_as_one(first: Path) -> None:
    model = open_model(first)
    assert [path.name for path in model.parts] == [part_name(1), part_name(2), part_name(3)]
    assert model.size_bytes == sum(path.stat().st_size for path in model.parts)
    assert model.metadata_str("general.architecture") == "llama"
    for number in range(1, COUNT + 1):
        tensor = model.tensor(f"blk.{number}.weight")
        assert tensor.path.name == part_name(number) and np.frombuffer(tensor.read(), np.float32)[0] == number


def test_parts_are_found_beside_a_link_and_not_beside_its_target(first: Path, tmp_path: Path) -> None:
    """Checks a layout of download caches, which keep parts under their hashes and link to them by name."""
    links = tmp_path / "links"
    links.mkdir()
    for number in range(1, COUNT + 1):
        blob = (tmp_path / part_name(number)).rename(tmp_path / f"blob{number}")
        (links / part_name(number)).symlink_to(blob)
    assert len(open_model(links / part_name(1)).tensors) == COUNT


def test_identity_depends_on_every_part(first: Path) -> None:
    before = open_model(first).identity
    write_part(first.parent, 3, extra="something else")
    assert open_model(first).identity != before


def delete(first: Path) -> None:
    first.with_name(part_name(2)).unlink()


def link_to_itself(first: Path) -> None:
    second = first.with_name(part_name(2))
    second.unlink()
    second.symlink_to(second)


def link_to_first(first: Path) -> None:
    second = first.with_name(part_name(2))
    second.unlink()
    second.symlink_to(first)


def copy_third_over_second(first: Path) -> None:
    shutil.copy(first.with_name(part_name(3)), first.with_name(part_name(2)))


def cut(first: Path) -> None:
    second = first.with_name(part_name(2))
    second.write_bytes(second.read_bytes()[:-1])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (delete, r"00002-of-00003\.gguf: no such file; .*part 2 of 3 of model-00001"),
    "cyclic": (link_to_itself, r"00002-of-00003\.gguf: cannot be opened: .*part 2 of 3"),
    "repeated": (link_to_first, r"00002-of-00003\.gguf: .*the same file as model-00001-of-00003\.gguf"),
    "copied": (copy_third_over_second, r"00002-of-00003\.gguf: split\.no: expected 1 in part 2, found 2"),
    "cut": (cut, r"00002-of-00003\.gguf: tensor .*ends at byte .*part 2 of 3"),
    "count in a part": (
        lambda first: write_part(first.parent, 2, split__count=np.uint16(4)),
        r"00002.*split\.count: this part says 4, but",
    ),
    "no number": (lambda first: write_part(first.parent, 2, split__no=None), r"00002.*split\.no: missing"),
    "tensor count": (
        lambda first: write_part(first.parent, 1, split__tensors__count=np.int32(7)),
        r"00001.*split\.tensors\.count: the first part says 7 tensors, but the parts have 3",
    ),
    "no tensor count": (
        lambda first: write_part(first.parent, 1, split__tensors__count=None),
        r"00001.*split\.tensors\.count: missing",
    ),
    "tensor in two parts": (
        lambda first: write_part(first.parent, 3, tensor="blk.1.weight"),
        r"00003.*'blk\.1\.weight': it is also in model-00001",
    ),
    "first is not first": (
        lambda first: write_part(first.parent, 1, split__no=np.uint16(1)),
        r"00001.*split\.no: this is part 2 of 3; give the first part",
    ),
    "number is text": (
        lambda first: write_part(first.parent, 2, split__no="x"),
        r"split\.no: expected a whole number of .*, found text",
    ),
    "count is zero": (
        lambda first: write_part(first.parent, 1, split__count=0),
        r"split\.count: the file says 0, but the file's name says 00003 parts",
    ),
    "count unlike the name": (
        lambda first: write_part(first.parent, 1, split__count=60_000),
        r"split\.count: this is one of 60000 parts, but its name does not end in -00001-of-60000\.gguf",
    ),
    "no count": (
        lambda first: write_part(first.parent, 1, split__count=None),
        r"split\.count: the key is missing, but the file's name says 00003 parts",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_belong_together(first: Path, name: str) -> None:
    change, message = WRONG[name]
    change(first)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_model(first)
    assert "\n" not in str(caught.value)


def test_another_part_than_the_first_names_the_first(first: Path) -> None:
    with pytest.raises(ModelFileError, match=r"part 2 of 3; give the first part, 'model-00001-of-00003\.gguf'"):
        open_model(first.with_name(part_name(2)))


def test_a_part_under_another_name_says_which_name_it_needs(first: Path) -> None:
    with pytest.raises(ModelFileError, match="its name does not end in -00001-of-00003"):
        open_model(first.rename(first.with_name("renamed.gguf")))


def test_a_file_that_llama_cpp_merged_is_one_file(tmp_path: Path) -> None:
    """Checks a file of `llama-gguf-split --merge`, which sets the number of parts to 0 and keeps the other keys."""
    path = write_part(tmp_path, 1, split__count=np.uint16(0)).rename(tmp_path / "merged.gguf")
    model = open_model(path)
    assert model.parts == (path,) and len(model.tensors) == 1
