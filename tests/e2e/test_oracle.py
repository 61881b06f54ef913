"""Tests of the comparison of logprob bits: it detects one changed low bit of a weight, and two swapped float
additions."""

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

from llamaclust.kernels._native import available_levels
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.clusters.oracle_answers import Answer, answers
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT, TESTS

NATIVE = Path("kernels/cpu/native")
FLIPS = 20
Q8_0_BLOCK_BYTES, Q8_0_SCALE_BYTES = 34, 2
BUILD_DEADLINE_S = 120  # A few seconds on an idle core.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", quant_type=QuantType.Q8_0)


def flipped(path: Path, source: random.Random, folder: Path) -> Path:
    """Returns a copy of the model with the lowest bit of one 8-bit weight flipped."""
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
    """The flips and the answers are the same in every run."""
    source = random.Random(4)
    expected = answers(model)
    assert answers(model) == expected
    for flip in range(FLIPS):
        assert answers(flipped(model, source, tmp_path)) != expected, flip


@dataclass(frozen=True, slots=True)
class Swap:
    """A change of a kernel source that swaps two float additions. `unit` is the file to compile."""

    unit: str
    source: str
    before: str
    after: str


SWAPS = {
    "norm": Swap(
        "vector",
        "vector.cpp",
        "add(add(lanes[0], lanes[2]), add(lanes[1], lanes[3]))",
        "add(add(lanes[0], lanes[1]), add(lanes[2], lanes[3]))",
    ),
    "attention": Swap(
        "attention/attention",
        "attention/kv_types.h",
        "for (int d = 0; d < task.head_dim; d++) {",
        "for (int e = 0; e < task.head_dim; e++) {\n    const int d = e < 2 ? 1 - e : e;",
    ),
}


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Rebuilds the installed build with one file that this machine's best level uses, compiled from a copy of the
    sources."""

    folder: Path
    commands: tuple[str, ...]
    tree: Path

    def answers(self, model: Path, unit: str) -> list[Answer]:
        compiled, linked = self.tree / "unit.o", self.tree / "_native.so"
        # -Og compiles in half the time of -O1. The code is slower but gives the same bits.
        compile_it, out = self._command(f"{self._level(unit)}/{unit}.cpp.o")
        compile_it = compile_it.replace(str(ROOT / NATIVE), str(self.tree / NATIVE)).replace("-O3", "-Og")
        self._run(f"{compile_it.replace(f'-o {out}', f'-o {compiled}')} -MF {self.tree / 'unit.d'}")
        link, library = self._command(r"_native\.[^/ ]*so")
        self._run(link.replace(out, str(compiled)).replace(f"-o {library}", f"-o {linked}"))
        script = TESTS / "support" / "clusters" / "oracle_answers.py"
        printed = json.loads(self._run(f"{sys.executable} {script} {model} {linked}"))
        return [[(token, bits) for token, bits in answer] for answer in printed]

    def _level(self, unit: str) -> str:
        """Returns the folder of the best level that compiles the unit. Levels that only add dot products have no other
        units."""
        folders = [f"cpu_{level}.dir/level" for level in reversed(available_levels())]
        return next(one for one in folders if any(f"{one}/{unit}.cpp.o" in command for command in self.commands))

    def _command(self, out: str) -> tuple[str, str]:
        """Returns the command that writes the file whose path ends with `out`, and the path."""
        for command in self.commands:
            made = re.search(rf"-o (\S*{out})(?: |$)", command)
            if made is not None:
                return command.removeprefix(": && ").split(" && ")[0], made[1]
        raise AssertionError(f"{self.folder} makes no {out}")

    def _run(self, command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=self.folder, capture_output=True, text=True, timeout=BUILD_DEADLINE_S
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def rebuild(tmp_path_factory: pytest.TempPathFactory) -> Rebuild:
    builds = [path for path in (ROOT / "build").glob("*") if (path / NATIVE / "CMakeFiles").is_dir()]
    assert builds, "there is no build of the kernels here: make build"
    folder = max(builds, key=lambda path: path.stat().st_mtime)
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert ninja is not None, "there is no ninja here: make build"
    printed = subprocess.run([ninja, "-t", "commands"], cwd=folder, capture_output=True, text=True, check=True)
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / NATIVE, tree / NATIVE)
    return Rebuild(folder, tuple(printed.stdout.splitlines()), tree)


@contextmanager
def applied(swap: Swap, tree: Path) -> Iterator[None]:
    source = tree / NATIVE / "level" / swap.source
    original = source.read_text()
    assert original.count(swap.before) == 1, f"{swap.source} has changed: name another addition"
    source.write_text(original.replace(swap.before, swap.after))
    try:
        yield
    finally:
        source.write_text(original)


@pytest.mark.parametrize("name", SWAPS)
def test_two_swapped_additions_are_noticed(name: str, rebuild: Rebuild, model: Path) -> None:
    swap, expected = SWAPS[name], answers(model)
    assert rebuild.answers(model, swap.unit) == expected, "the same sources give other answers: make build"
    with applied(swap, rebuild.tree):
        assert rebuild.answers(model, swap.unit) != expected


def test_every_test_that_the_numerics_page_names_is_there() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+)::(test_\w+)`", (ROOT / "docs/internals/numerics.md").read_text())
    assert len(named) > 40
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\(", (TESTS / f"{file}.py").read_text(), re.M), f"{file}::{test}"
