"""Tests of benchmarks/gpu_support/kit.sh: setup and messages of a kit for machines without network."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Never

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.kernels.cuda.runtime import nvrtc as runtime
from llamaclust.kernels.cuda.runtime.cubin_cache import CubinCache
from llamaclust.kernels.cuda.runtime.sources import modules, whole_text
from support.cuda.shim_build import compiler
from support.paths import ROOT, TESTS

sys.path.append(str(ROOT / "benchmarks"))
from gpu_support import cubins, unpack

SCRIPTS = ROOT / "benchmarks" / "gpu_support"
READY = """
[project]
dependencies = ["numpy>=1", "brought>=2.5"]
optional-dependencies = {cuda13 = ["brought"]}
[dependency-groups]
test = ["pytest>=8", "other-tests>=9"]
"""
PROJECT = """
[project]
dependencies = ["numpy>=1", "brought>=2.5", "old_one>=3", "nowhere>=1"]
optional-dependencies = {cuda13 = ["nothing-for-gpus==13.*"]}
[dependency-groups]
test = ["pytest>=8", "pytest-of-nobody", "other-tests>=9"]
"""
METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
CONTENT = {
    "native/_native.abi3.so": "compiled",
    "kernels/rows-1.cubin": "machine code",
    "nvrtc": "12.7\n",
    "packages/brought.py": "",
    "packages/Brought-2.5.dist-info/METADATA": METADATA.format("Brought", "2.5")
    + "Requires-Dist: its-extra; extra == 'more'\nRequires-Dist: numpy\n",
}
SHORT = {"packages/old_one-2.9.dist-info/METADATA": METADATA.format("old_one", "2.9") + "Requires-Dist: its-need>=7\n"}


def kit(folder: Path, more: dict[str, str] | None = None) -> Path:
    """Builds a kit that another user packed, with world-writable files."""
    folder.mkdir(exist_ok=True)
    for name in ("setup.sh", "unpack.py"):
        (folder / name).write_bytes((SCRIPTS / name).read_bytes())
    with tarfile.open(folder / "content.tar.xz", "w:xz") as archive:
        for name, text in (CONTENT | (more or {})).items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid, member.gid = len(text), 0o666, 4711, 4711
            archive.addfile(member, io.BytesIO(text.encode()))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "a tree"
    (tree / "src" / "llamaclust" / "kernels").mkdir(parents=True)
    (tree / "pyproject.toml").write_text(READY)
    return tree


def set_up(tree: Path, kit: Path, status: int = 0) -> tuple[list[str], list[str]]:
    """Runs setup.sh; returns its lines of stderr, and the resulting values of variables and paths of modules."""
    python = f"python3() {{ '{sys.executable}' \"$@\"; }}"
    after = "import os, brought; print(os.environ['LLAMACLUST_HOME'], brought.__file__, sep='\\n')"
    lines = (python, f". '{kit}/setup.sh'", 'echo "${PYTHONPATH%%:*}"', "type -p llamaclust", f'python3 -c "{after}"')
    done = subprocess.run(
        ["bash", "-c", " && ".join(lines)], cwd=tree, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done.stderr.splitlines(), done.stdout.splitlines()


def test_a_tree_is_ready_after_setup(tree: Path, tmp_path: Path) -> None:
    packed = kit(tmp_path / "a kit")
    _, found = set_up(tree, packed)
    unpacked = tree / "build" / "gpu-kit-unpacked"
    home = unpacked / "home"
    brought = unpacked / "packages" / "brought.py"
    assert found == [str(tree / "src"), str(unpacked / "bin" / "llamaclust"), str(home), str(brought)]
    assert (tree / "src/llamaclust/kernels/_native.abi3.so").read_text() == "compiled"
    kernel = home / "kernels" / "rows-1.cubin"
    assert kernel.read_text() == "machine code"
    for path in (kernel, kernel.parent):
        assert path.stat().st_uid == tree.stat().st_uid and not path.stat().st_mode & 0o022


def test_kernels_of_earlier_commands_are_kept_until_the_kit_changes(tree: Path, tmp_path: Path) -> None:
    packed, compiled = kit(tmp_path / "kit"), tree / "build/gpu-kit-unpacked/home/kernels/compiled-1.cubin"
    set_up(tree, packed)
    compiled.touch()
    set_up(tree, packed)
    assert compiled.exists()
    set_up(tree, kit(tmp_path / "kit", {"packages/new.py": ""}))
    assert not compiled.exists()


@pytest.mark.parametrize("name", ["build/gpu-kit", "build/gpu-kit-unpacked"])
def test_a_kit_does_not_remove_itself(tree: Path, name: str) -> None:
    (tree / "build").mkdir()
    packed = kit(tree / name)
    said, found = set_up(tree, packed, status=int(name.endswith("unpacked")))
    assert (packed / "content.tar.xz").exists()
    assert found if name == "build/gpu-kit" else "move the kit to another folder" in said[-1]


def test_what_is_missing_is_named_and_nothing_is_set_up(tree: Path, tmp_path: Path) -> None:
    (tree / "pyproject.toml").write_text(PROJECT)
    said, found = set_up(tree, kit(tmp_path / "kit", SHORT), status=1)
    assert found == []
    needed = {line.partition(",")[0]: line for line in said if " is needed" in line}
    assert [line.partition(" is needed")[0] for line in needed] == [
        "old_one>=3",
        "nowhere>=1",
        "nothing-for-gpus==13.*",
        "pytest-of-nobody",
        "its-need>=7",
    ]
    assert "but 2.9 is installed;" in needed["old_one>=3 is needed"]
    assert "but none is installed;" in needed["nowhere>=1 is needed"]
    assert said[0].startswith("kernels are compiled here") and said[0].endswith("the kit's 12.7")


def test_requirements_are_the_projects_own() -> None:
    found = " ".join(unpack.required(ROOT))
    assert all(name in found for name in ("numpy", "llguidance", "cupy", "cuda-pathfinder", "pytest-asyncio", "psutil"))


def test_compiled_kernels_are_found_where_nothing_can_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = TESTS / "kernels" / "cuda" / "fake_nvrtc.cpp"
    command = [compiler(), "-shared", "-fPIC", str(fake), "-o", str(tmp_path / "libnvrtc.so.13")]
    subprocess.run(command, check=True, timeout=120)
    nvrtc = cubins.open_nvrtc_in(tmp_path)
    cubins.compile_all(nvrtc, 90, tmp_path / "kept", tmp_path / "out")
    (tmp_path / "kept" / "earlier-1.cubin").touch()
    cubins.compile_all(nvrtc, 90, tmp_path / "kept", tmp_path / "out")

    def compile_none(*arguments: object) -> Never:
        raise AssertionError("it is compiled again")

    monkeypatch.setattr(runtime.Nvrtc, "compile", compile_none)
    cache = CubinCache(tmp_path / "out")
    found = [cache.get(nvrtc, name, whole_text(path), 90) for name, path in modules().items()]
    assert sorted(found) == sorted((tmp_path / "out").iterdir()) and len(found) == len(modules())
    with pytest.raises(UsageError, match=r"no libnvrtc\.so"):
        cubins.open_nvrtc_in(tmp_path / "out")
