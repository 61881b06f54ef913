"""Tests of the build's check that a feature level's objects contain no code that runs on processors without the
level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
TOOLS = ("cmake", "c++", "nm", "readelf")
CLEAN = """
namespace llamaclust::avx2 {
float table[4] = {1, 2, 3, 4};
float first() { return table[0]; }
}
"""


def check(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the build's check on an object compiled from this source."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(f"objects are checked with {', '.join(missing)}")
    (folder / "unit.cpp").write_text(source)
    environment = os.environ | {"PATH": PATH}
    compiled = folder / "unit.o"
    subprocess.run(["c++", "-c", "-o", compiled, folder / "unit.cpp"], env=environment, timeout=60.0, check=True)
    values = {"NM": "nm", "READELF": "readelf", "LEVEL": "avx2", "OBJECTS": compiled}
    options = [f"-D{name}={value}" for name, value in values.items()]
    command = ["cmake", *options, "-P", str(ROOT / "cmake/check_isa.cmake")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60.0, check=False)


def test_functions_and_constants_of_the_level_pass(tmp_path: Path) -> None:
    done = check(CLEAN, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("addition", "failure"),
    [
        ("int read(); static int at_start = read();", "static initializer: section .init_array"),
        ("__attribute__((destructor)) static void at_end() {}", "static initializer: section .fini_array"),
        ("template <int n> int shared() { return n; } template int shared<1>();", "weak symbol: int shared<1>()"),
        ("int outside() { return 1; }", " T outside()"),
    ],
    ids=lambda value: value.split(":")[0],
)
def test_what_may_run_elsewhere_fails(addition: str, failure: str, tmp_path: Path) -> None:
    done = check(CLEAN + addition, tmp_path)
    assert done.returncode != 0
    assert failure in " ".join(done.stderr.split())
