"""Checks that split and merged models equal the original for our reader and gguf-py; failures leave no file."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

from llamaclust.cli.main import main
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.gguf.header import raw_metadata
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.tools import split
from llamaclust.tools.progress import silent
from llamaclust.tools.split import SplitRules, plan_merge, plan_split, write_parts
from support.models.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a model with metadata of types that Python's numbers do not distinguish."""
    odd: dict[str, WritableValue] = {
        "x.i32": np.int32(7),
        "x.u64": np.uint64(8),
        "x.f64": np.float64(0.1),
        "x.i8": np.int8(3),
        "x.b": True,
    }
    path = tmp_path_factory.mktemp("split") / "tiny.gguf"
    return build_tiny_model(path, layers=3, hidden=64, heads=4, ffn=96, extra={**odd, "x.bools": np.array([True])})


def split_into(tiny: Path, folder: Path, rules: SplitRules) -> list[Path]:
    parts = plan_split(open_model(tiny), folder / "m", rules)
    write_parts(parts, silent)
    return [part.path for part in parts]


def tensors_of(reader: gguf.GGUFReader) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}


@pytest.mark.parametrize(
    "rules",
    [
        SplitRules(most_tensors=5),
        SplitRules(most_bytes=60_000),
        SplitRules(most_tensors=7, no_tensor_first=True),
        SplitRules(most_bytes=60_000, no_tensor_first=True),
        SplitRules(),
    ],
)
def test_parts_hold_the_model_and_merge_to_the_same_bytes(rules: SplitRules, tiny: Path, tmp_path: Path) -> None:
    paths = split_into(tiny, tmp_path, rules)
    count = len(paths)
    assert [path.name for path in paths] == [f"m-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    assert sorted(tmp_path.iterdir()) == paths, "nothing else is left"
    whole = gguf.GGUFReader(tiny)
    found: dict[str, bytes] = {}
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        said = [reader.fields[f"split.{key}"] for key in ("no", "count", "tensors.count")]
        assert [field.contents() for field in said] == [number, count, len(whole.tensors)]
        kinds = gguf.GGUFValueType
        assert [field.types for field in said] == [[kinds.UINT16], [kinds.UINT16], [kinds.INT32]]
        found |= tensors_of(reader)
        size = sum(-(-tensor.n_bytes // 32) * 32 for tensor in reader.tensors)
        if rules.most_bytes:
            assert size <= rules.most_bytes
        elif number + 1 < count:
            empty = number == 0 and rules.no_tensor_first
            assert len(reader.tensors) == (0 if empty else rules.most_tensors)
    assert list(found.items()) == list(tensors_of(whole).items())
    if count > 1:
        write_parts([plan_merge(open_model(paths[0]), tmp_path / "back.gguf")], silent)
        assert (tmp_path / "back.gguf").read_bytes() == tiny.read_bytes()


def test_values_keep_their_types(tiny: Path, tmp_path: Path) -> None:
    first = split_into(tiny, tmp_path, SplitRules(most_tensors=5))[0]
    kept = {key: value for key, value in raw_metadata(first).items() if not key.startswith("split.")}
    assert list(kept.items()) == list(raw_metadata(tiny).items())
    fields = gguf.GGUFReader(first).fields
    kinds = [fields[f"x.{name}"].types[0].name for name in ("i32", "u64", "f64", "i8", "b")]
    assert kinds == ["INT32", "UINT64", "FLOAT64", "INT8", "BOOL"]


def test_an_alignment_of_its_own_is_kept(tmp_path: Path) -> None:
    data = [np.full(5, number, np.float32).tobytes() for number in range(3)]
    sources = [
        TensorSource(f"t{number}", QuantType.F32, (5,), partial(bytes, stored)) for number, stored in enumerate(data)
    ]
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama", "general.alignment": np.uint32(128)}, sources)
    paths = split_into(tmp_path / "a.gguf", tmp_path, SplitRules(most_tensors=1))
    for number, path in enumerate(paths):
        (tensor,) = gguf.GGUFReader(path).tensors
        assert (tensor.data.tobytes(), tensor.data_offset % 128) == (data[number], 0)
    write_parts([plan_merge(open_model(paths[0]), tmp_path / "b.gguf")], silent)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_large_tensors_pass_in_pieces(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_PIECE_BYTES", 1000)
    reported: list[tuple[str, int, int]] = []
    parts = plan_split(open_model(tiny), tmp_path / "m", SplitRules(most_tensors=9))
    write_parts(parts, lambda *what: reported.append(what))
    total = sum(tensor.n_bytes for tensor in open_model(tiny).tensors.values())
    assert reported[-1][1:] == (total, total)
    assert max(after[1] - before[1] for before, after in pairwise(reported)) == 1000


def test_nothing_is_left_where_it_fails(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copy(tiny, tmp_path / "copy.gguf")
    (tmp_path / "out").mkdir()
    parts = plan_split(open_model(copy), tmp_path / "out/m", SplitRules(most_tensors=5))
    with Path(copy).open("r+b") as file:
        file.truncate(Path(copy).stat().st_size // 2)
    with pytest.raises(LlamaclustError, match="shrank"):
        write_parts(parts, silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00006.gguf").write_text("mine")
    with pytest.raises(UsageError, match=r"m-00002-of-00006\.gguf already exists"):
        split_into(tiny, tmp_path, SplitRules(most_tensors=5))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llamaclust", "model", *map(str, words)])
        main()
    out, err = capsys.readouterr()
    return int(str(ended.value.code)), out, err


def test_the_commands(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("split", tiny, tmp_path / "m", "--split-max-size", "60kB")
    code, planned, _ = run(capsys, *words, "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    code, done, _ = run(capsys, *words)
    assert (code, done) == (0, planned)
    first, *_ = sorted(tmp_path.iterdir())
    for line, path in zip(done.splitlines(), sorted(tmp_path.iterdir()), strict=True):
        assert line.startswith(f"{path}  ") and line.endswith(f", {path.stat().st_size:,} bytes")
    code, out, _ = run(capsys, "merge", first)
    assert code == 0 and out.startswith(f"{tmp_path / 'm.gguf'}  ")
    assert (tmp_path / "m.gguf").read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("split", "TINY", "--split-max-size", "1kB"), "a part holds 1000: raise --split-max-size"),
        (("split", "TINY", "--split-max-size", "many"), "--split-max-size: 'many' is not a size"),
        (("split", "TINY", "--split-max-size", "1M", "--split-max-tensors", "3"), "give one of them"),
        (("split", "TINY", "--split-max-tensors", "0"), "--split-max-tensors"),
        (("split", "TINY", "/nonexistent/x"), "the folder does not exist"),
        (("split", "PART"), "is already split; merge it first"),
        (("merge", "TINY"), "is already one file"),
        (("merge", "SECOND"), "give the first part"),
    ],
)
def test_mistakes_get_one_line(
    words: tuple[str, ...], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = split_into(tiny, tmp_path, SplitRules(most_tensors=5))
    places = {"TINY": tiny, "PART": first, "SECOND": second}
    code, out, err = run(capsys, *(places.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
