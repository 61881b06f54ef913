"""Tests of the wheel in dist/: its contents, and an answer to the demo's question on a system without a compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from scikit_build_core.build import prepare_metadata_for_build_wheel

from llamaclust.cluster.config.environment import environment
from support.paths import ROOT

TOOLS = ("bash", "basename", "dirname", "false", "ln", "mkdir", "mktemp", "realpath", "rm", "stat")
LARGEST_BYTES = 8 << 20
LICENSES = ["LICENSE", "LICENSE.OpenSSL"]
DEADLINE_S = 600.0


@pytest.fixture
def wheel() -> Path:
    found = list((ROOT / "dist").glob("*.whl"))
    if not found:
        pytest.skip("there is no wheel in dist/: make wheel")
    (wheel,) = found
    return wheel


def test_one_small_wheel_is_for_every_python(wheel: Path) -> None:
    found = re.fullmatch(r"llamaclust-[\d.]+-cp311-abi3-manylinux_2_(\d+)_\w+\.whl", wheel.name)
    assert found is not None
    # A wheel that is built with a later libc may need that libc.
    if tuple(map(int, platform.libc_ver()[1].split("."))) <= (2, 36):
        assert int(found[1]) <= 28
    assert wheel.stat().st_size <= LARGEST_BYTES


def test_it_holds_one_compiled_module_and_what_gpus_compile(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
    assert [str(name) for name in names if name.suffix == ".so"] == ["llamaclust/kernels/_native.abi3.so"]
    suffixes = {name.suffix for name in names}
    assert ".cu" in suffixes and ".h" in suffixes and ".cpp" not in suffixes
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {"llamaclust"}


def test_it_has_the_licenses_of_what_it_contains(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {
            name.partition("/licenses/")[2]: archive.read(name)
            for name in archive.namelist()
            if "/licenses/" in name and not name.endswith("/")
        }
    assert found == {name: (ROOT / name).read_bytes() for name in LICENSES}


def test_the_build_takes_the_licenses_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of the build compiles nothing."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / prepare_metadata_for_build_wheel(str(tmp_path))
    told = [
        line.partition(": ")[2] for line in (folder / "METADATA").read_text().splitlines() if "License-File" in line
    ]
    assert told == LICENSES
    texts = [(folder / "licenses" / name).read_text() for name in LICENSES]
    assert "MIT License" in texts[0] and "OpenSSL" in texts[1] and "Apache License" in texts[1]
    assert "9. Accepting Warranty or Additional Liability" in texts[1]


def path_without_compilers(folder: Path) -> str:
    for tool in TOOLS:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    assert not any(shutil.which(tool, path=str(folder)) for tool in ("cc", "c++", "gcc", "g++", "clang", "cmake"))
    return str(folder)


@pytest.mark.promise
@pytest.mark.timeout(2 * DEADLINE_S)
def test_it_answers_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    if not (environment().home / "models/smollm2-135m-instruct").is_dir():
        pytest.skip("the demo's model is not here: make model")
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LLAMACLUST_HOME") or "PIP" in name}
    done = subprocess.run(
        [ROOT / "deploy/wheel_test.sh", wheel, Path(sys.executable).resolve()],
        env=kept | {"PATH": path_without_compilers(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert re.search(r"installed in \d+ s, answered after \d+ s$", done.stdout)
