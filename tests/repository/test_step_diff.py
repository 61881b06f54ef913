"""Checks the example step in CONTRIBUTING.md: in a copy of the sources, all backends compute the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from llamaclust.kernels import _native
from support.diffs import diff_of, hunks
from support.paths import ROOT, TESTS

MOST_LINES = 48
PROGRAM = """
import numpy as np
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.model.costs import all_macs
from llamaclust.model.groups.portions import Division
from llamaclust.model.program import AddScaled, Buffer, Slice
from support.arithmetic.backends import BACKENDS
from support.arithmetic.single_steps import LIMITS, Case, normal, program_of, rows_at, run_case

hidden, x, y, out = Buffer("hidden", 128), *(Buffer(name, 64) for name in ("x", "y", "out"))
program = program_of(hidden, out, Slice(hidden, x, 0), Slice(hidden, y, 64), AddScaled(x, y, out, 0.3))
rows = normal(np.random.default_rng(1), 40, 128)
case = Case(program, {}, [(rows_at(range(40)), rows)])
(wanted,) = run_case(BACKENDS["reference"](), case, {})
np.testing.assert_allclose(wanted, rows[:, :64] + 0.3 * rows[:, 64:], atol=1e-6)
assert len(BACKENDS) > 1
for name, backend in BACKENDS.items():
    np.testing.assert_array_equal(run_case(backend(), case, {})[0].view(np.uint32), wanted.view(np.uint32), name)
assert Division.of(program, 2).steps[-1].units == all_macs(program.steps) == 0
print(*sorted(Plan(program, {}, LIMITS).kernels))
"""
"""Prints the kernels of a GPU's plan. No GPU is needed."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Returns a copy of the package. Folders that the diff changes are copied, and others are symbolic links."""
    package = tmp_path / "llamaclust"
    package.mkdir()
    for path in (ROOT / "src/llamaclust").glob("[!_]*"):
        if path.name in ("model", "kernels"):
            copytree(path, package / path.name, ignore=ignore_patterns("__pycache__", "native"))
        else:
            (package / path.name).symlink_to(path)
    (package / "__init__.py").write_text("")
    (package / "kernels" / Path(_native.__file__).name).symlink_to(_native.__file__)
    return package


def test_a_step_is_its_dataclass_and_one_place_in_each_backend(copy: Path) -> None:
    diff = diff_of("Add a step")
    assert len(diff.splitlines()) <= MOST_LINES
    for path, changes in hunks(diff).items():
        text = (copy / path).read_text()
        for before, after in changes:
            assert text.count(before) == 1, f"{path}: not there, or twice:\n{before}"
            text = text.replace(before, after)
        (copy / path).write_text(text)
    installed = [path for path in sys.path if path.endswith("-packages")]
    paths = os.pathsep.join([str(copy.parent), str(TESTS), *installed])
    command = [sys.executable, "-S", "-c", PROGRAM]  # -S disables the hook of the editable installation.
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {"elementwise.rows.add_rows", "elementwise.rows.scale_rows"} <= {*done.stdout.split()}
