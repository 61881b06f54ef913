"""The oracle itself: comparing logprob bits notices one low bit of a weight, and two float additions that change
places."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracle_answers import Answer, answers
from tiny_model import build_tiny_model

from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType

ROOT = Path(__file__).parent.parent
NATIVE = Path("kernels/cpu/native")
FLIPS = 20
Q8_0_BLOCK_BYTES, Q8_0_SCALE_BYTES = 34, 2
BUILD_DEADLINE_S = 500  # half a minute on two idle cores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", quant_type=QuantType.Q8_0)


def flipped(path: Path, source: random.Random, folder: Path) -> Path:
    """A copy in which the lowest bit of one 8-bit weight is another."""
    with Model.open(path) as model:
        names = sorted(name for name in model.file.tensors if name.startswith("blk.") and "norm" not in name)
        tensor = model.file.tensors[source.choice(names)]
    block = source.randrange(tensor.n_bytes // Q8_0_BLOCK_BYTES)
    place = block * Q8_0_BLOCK_BYTES + source.randrange(Q8_0_SCALE_BYTES, Q8_0_BLOCK_BYTES)
    data = bytearray(path.read_bytes())
    data[tensor.offset + place] ^= 1
    copy = folder / "flipped.gguf"
    copy.write_bytes(data)
    return copy


def test_one_low_bit_of_a_weight_is_noticed(model: Path, tmp_path: Path) -> None:
    """The flips are the same in every run, and so are the answers: that is the promise."""
    source = random.Random(4)
    expected = answers(model)
    assert answers(model) == expected
    for flip in range(FLIPS):
        assert answers(flipped(model, source, tmp_path)) != expected, flip


@dataclass(frozen=True, slots=True)
class Swap:
    """Two float additions that change places in a source of the kernels."""

    source: str
    before: str
    after: str


SWAPS = {
    "norm": Swap(
        "level/vector.cpp",
        "add(add(lanes[0], lanes[2]), add(lanes[1], lanes[3]))",
        "add(add(lanes[0], lanes[1]), add(lanes[2], lanes[3]))",
    ),
    "attention": Swap(
        "level/attention_f16.h",
        "for (int d = 0; d < task.head_dim; d++) {",
        "for (int e = 0; e < task.head_dim; e++) {\n    const int d = e < 2 ? 1 - e : e;",
    ),
}


@dataclass(frozen=True, slots=True)
class Build:
    """A copy of the native sources and a build of its plain C++ level."""

    tree: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.tree, capture_output=True, text=True, timeout=BUILD_DEADLINE_S
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def configure(self) -> None:
        nanobind = self.run(sys.executable, "-m", "nanobind", "--cmake_dir").strip()
        self.run(
            "cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMACLUST_LEVELS=generic", f"-Dnanobind_DIR={nanobind}", f"-DPython_EXECUTABLE={sys.executable}",
        )  # fmt: skip

    def answers(self, model: Path) -> list[Answer]:
        self.run("cmake", "--build", "build")
        (native,) = (self.tree / "build" / NATIVE).glob("_native*.so")
        script = Path(__file__).parent / "oracle_answers.py"
        printed = json.loads(self.run(sys.executable, str(script), str(model), str(native)))
        return [[(token, bits) for token, bits in answer] for answer in printed]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    tree = tmp_path_factory.mktemp("tree")
    build = Build(tree)
    path = build.environment["PATH"]
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"a build of the kernels needs {', '.join(missing)}")
    shutil.copytree(ROOT / NATIVE, tree / NATIVE)
    shutil.copytree(ROOT / "cmake", tree / "cmake")
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    (tree / "src" / "llamaclust").mkdir(parents=True)
    flags = tree / NATIVE / "arithmetic.cmake"
    assert "-O3" in flags.read_text()
    flags.write_text(flags.read_text().replace("-O3", "-O1"))  # quicker to compile, slower to run, of the same bits
    build.configure()
    return build


@contextmanager
def applied(swap: Swap, tree: Path) -> Iterator[None]:
    source = tree / NATIVE / swap.source
    original = source.read_text()
    assert original.count(swap.before) == 1, f"{swap.source} has changed: name another addition"
    source.write_text(original.replace(swap.before, swap.after))
    try:
        yield
    finally:
        source.write_text(original)


@pytest.mark.timeout(BUILD_DEADLINE_S + 20)
def test_two_swapped_additions_are_noticed(build: Build, model: Path) -> None:
    expected = answers(model)
    assert build.answers(model) == expected, (
        "a build of the same sources gives other answers: is the installed one old?"
    )
    for name, swap in SWAPS.items():
        with applied(swap, build.tree):
            assert build.answers(model) != expected, name


def test_every_test_that_the_numerics_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs" / "numerics.md").read_text())
    assert len(named) > 40
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.M), (
            f"{file}::{test}"
        )
