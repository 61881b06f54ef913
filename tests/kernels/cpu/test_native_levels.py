"""Tests that feature levels which this machine lacks give its bits: ARM levels are compiled and run in an emulator, and
loops on tile registers run with a model of these registers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamaclust.kernels import _native
from support.paths import ROOT

BUILD_DEADLINE_S, RUN_DEADLINE_S = 900.0, 300.0
CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
QEMU = CROSS[1]
OBJECTS = "kernels/cpu/native/CMakeFiles"
HOST_LEVELS = {"x86_64": "avx2", "aarch64": "neon"}
QUICK = "-DLLAMACLUST_OPTIMIZATION=-O1"
"""Compiles four times faster, with the same bits."""
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

Bits = dict[str, str]
"""The CRC of each operation's results, by its name."""


def run(*command: str, deadline_s: float = RUN_DEADLINE_S) -> str:
    done = subprocess.run(
        command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=deadline_s, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def program(name: str, *options: str, target: str = "level_bits") -> Path:
    """Builds a program in a persistent folder, so that only changes are compiled."""
    folder = ROOT / "build" / f"level-bits-{name}"
    options = ("-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "-S", str(ROOT / "tests/kernels/native"), "-B", str(folder), "-G", "Ninja", *options)
    run("cmake", "--build", str(folder), "--target", target, deadline_s=BUILD_DEADLINE_S)
    return folder / target


def bits_of(printed: str) -> tuple[dict[str, Bits], str]:
    """Returns the bits of each level, and the best level according to the program."""
    levels: dict[str, Bits] = {}
    *lines, best = (line.split() for line in printed.splitlines())
    for level, operation, crc in lines:
        levels.setdefault(level, {})[operation] = crc
    assert best[0] == "best"
    return levels, best[1]


def require(tools: tuple[str, ...]) -> None:
    missing = [tool for tool in tools if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(f"ARM's feature levels are tested with {', '.join(missing)}: sudo make system-deps-test")


@pytest.fixture(scope="module")
def arm() -> Path:
    require(("cmake", "ninja", *CROSS))
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS[0]}")
    return program("aarch64", "-DLLAMACLUST_LEVELS=neon;neon_dotprod;neon_i8mm", QUICK, *system)


@pytest.fixture(scope="module")
def level() -> str:
    """Returns this machine's level to compare with; tests of the Python module check that its levels agree."""
    level = HOST_LEVELS.get(platform.machine())
    if level is None or level not in _native.available_levels():
        pytest.skip(f"nothing to compare with on this machine: {platform.machine()} without {level}")
    return level


@pytest.fixture(scope="module")
def objects(level: str) -> str:
    """Returns the option with the folder of the objects that `make build` has compiled."""
    built = [folder for folder in (ROOT / "build").glob(f"*/{OBJECTS}") if (folder / f"cpu_{level}.dir").is_dir()]
    if not built:
        pytest.skip("there is no build of the kernels here: make build")
    return f"-DLLAMACLUST_OBJECTS={max(built, key=lambda folder: folder.stat().st_mtime)}"


@pytest.fixture(scope="module")
def here(level: str, objects: str) -> Mapping[str, Bits]:
    """Returns the bits that the level computes."""
    levels, _ = bits_of(run(str(program("host", objects)), level))
    assert set(levels) == {level, "any"}
    return levels


def check_equal_bits(arm: Mapping[str, Bits], here: Mapping[str, Bits]) -> None:
    (expected,) = (bits for level, bits in here.items() if level != "any")
    assert len(expected) == 106
    assert len(set(expected.values())) == len(expected), "checksums that do not vary check nothing"
    for level, bits in arm.items():
        wanted = here["any"] if level == "any" else expected
        assert {name: crc for name, crc in bits.items() if crc != wanted[name]} == {}, level
        assert bits.keys() == wanted.keys()


@pytest.mark.timeout(2 * BUILD_DEADLINE_S)
def test_a_processor_with_products_of_row_pairs(arm: Path, here: Mapping[str, Bits]) -> None:
    levels, best = bits_of(run(QEMU, "-cpu", "max", str(arm), "neon_i8mm"))
    assert (set(levels), best) == ({"neon_i8mm", "any"}, "neon_i8mm")
    check_equal_bits(levels, here)


@pytest.mark.timeout(2 * BUILD_DEADLINE_S)
def test_a_processor_with_dot_products(arm: Path, here: Mapping[str, Bits]) -> None:
    levels, best = bits_of(run(QEMU, "-cpu", "neoverse-n1", str(arm)))
    assert (set(levels), best) == ({"neon", "neon_dotprod", "any"}, "neon_dotprod")
    check_equal_bits(levels, here)


@pytest.mark.timeout(2 * BUILD_DEADLINE_S)
def test_a_processor_without_them_is_never_given_any(arm: Path, here: Mapping[str, Bits]) -> None:
    """Dot products are illegal instructions on this processor."""
    levels, best = bits_of(run(QEMU, "-cpu", "cortex-a72", str(arm)))
    assert (set(levels), best) == ({"neon", "any"}, "neon")
    check_equal_bits(levels, here)


@pytest.mark.timeout(2 * BUILD_DEADLINE_S)
def test_loops_of_tile_registers(level: str, objects: str, here: Mapping[str, Bits]) -> None:
    tiles = program("tiles", objects, QUICK, f"-DLLAMACLUST_TILES_OVER={level}", target="tile_bits")
    printed = {operation: crc for _, operation, crc in map(str.split, run(str(tiles), level).splitlines())}
    assert len(printed) == 75
    assert {name: crc for name, crc in printed.items() if crc != here[level][name]} == {}
