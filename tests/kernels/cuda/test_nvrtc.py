"""Tests of requests to a fake NVRTC; test_compile.py uses a real one if there is one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.kernels.cuda.runtime.nvrtc import Nvrtc
from llamaclust.kernels.cuda.runtime.sources import OPTIONS, whole_text
from support.cuda.shim_build import compiler
from support.paths import TESTS

FAKE = TESTS / "kernels" / "cuda" / "fake_nvrtc.cpp"


def library(folder: Path, *defines: str) -> str:
    made = folder / "nvrtc.so"
    command = [compiler(), "-shared", "-fPIC", *defines, str(FAKE), "-o", str(made)]
    subprocess.run(command, check=True, timeout=120)
    return str(made)


def test_exactly_our_options(tmp_path: Path) -> None:
    nvrtc = Nvrtc(library(tmp_path))
    assert nvrtc.version == (13, 1)
    assert nvrtc.architectures == (75, 90, 120)
    for architecture, target in ((75, "sm_75"), (90, "sm_90a"), (120, "sm_120")):
        binary = nvrtc.compile("rows", "text", architecture)
        given = [*OPTIONS, f"--gpu-architecture={target}", "--device-as-default-execution-space"]
        assert (binary.kind, binary.data.decode()) == ("cubin", f"cubin rows.cu {' '.join(given)}")


def test_a_gpu_that_came_later(tmp_path: Path) -> None:
    """The driver gets PTX for the newest architecture that is not newer than the GPU."""
    nvrtc = Nvrtc(library(tmp_path))
    for gpu, wanted in ((103, "compute_90"), (121, "compute_120")):
        binary = nvrtc.compile("rows", "text", gpu)
        assert binary.kind == "ptx" and f"--gpu-architecture={wanted} " in binary.data.decode()


def test_errors_have_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(LlamaclustError, match=r"NVRTC \(13, 1\) cannot compile rows .*: bad is bad"):
        Nvrtc(library(tmp_path)).compile("rows", "bad text", 90)


def test_an_old_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is NVRTC 11.1; kernels need NVRTC of CUDA 12 or 13"):
        Nvrtc(library(tmp_path, "-DMAJOR=11"))


def test_includes_are_put_in_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.cu").write_text('#include "sub/b.h"\n#include "c.h"\n#include <cmath>\n#include "other.h"\nint a;\n')
    (tmp_path / "sub" / "b.h").write_text('#pragma once\n#include "near.h"\n#include "c.h"\nint b;\n')
    (tmp_path / "sub" / "near.h").write_text("int near;\n")
    (tmp_path / "c.h").write_text("#pragma once\nint c;\n")
    text = whole_text(tmp_path / "a.cu", (tmp_path,))
    said = [line for line in text.splitlines() if line and not line.startswith("#line")]
    conditional = ["#ifndef __CUDACC_RTC__", "#include <cmath>", "#endif"]
    assert said == ["int near;", "int c;", "int b;", *conditional, '#include "other.h"', "int a;"]
    assert '#line 5 "a.cu"\n#include' not in text and '#line 4 "a.cu"\n#include "other.h"' in text
