"""CUDA compilers of this machine, for tests that compile kernels for GPUs that the machine lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from llamaclust.core.errors import UsageError
from llamaclust.kernels.cuda.runtime.nvrtc import Nvrtc, machine_target, open_nvrtc
from llamaclust.kernels.cuda.runtime.sources import OPTIONS

COMPILE_DEADLINE_S = 400.0
TOOLKIT = Path("/usr/local/cuda")
NONE = "no CUDA compiler: neither NVRTC (make cuda-matrix installs it) nor nvcc"


@dataclass(frozen=True, slots=True)
class ByNvrtc:
    """A compiler that calls NVRTC, as users' machines do."""

    nvrtc: Nvrtc
    quick: ClassVar[tuple[str, ...]] = ()
    quick_binary: ClassVar[tuple[str, ...]] = ()

    @property
    def architectures(self) -> tuple[int, ...]:
        return self.nvrtc.architectures

    def binary(self, name: str, text: str, architecture: int, options: tuple[str, ...] = OPTIONS) -> bytes:
        binary = self.nvrtc.compile(name, text, architecture, options)
        assert binary.kind == "cubin"
        return binary.data

    def ptx(self, name: str, text: str, architecture: int, options: tuple[str, ...] = OPTIONS) -> str:
        target = f"--gpu-architecture={machine_target(architecture, 'compute')}"
        return self.nvrtc.translate("ptx", name, text, (*options, target)).decode()


@dataclass(frozen=True, slots=True)
class ByNvcc:
    """A compiler that runs the toolkit's nvcc, which has NVRTC's back end. `quick` are options for PTX that only has to
    compile, `quick_binary` for such machine code, in half the time."""

    nvcc: str
    quick: ClassVar[tuple[str, ...]] = ("-Xcicc", "-O0")
    quick_binary: ClassVar[tuple[str, ...]] = ("-Xcicc", "-O1", "-Xptxas", "-O1")

    @property
    def architectures(self) -> tuple[int, ...]:
        listed = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True, timeout=60)
        return tuple(sorted(int(one) for one in re.findall(r"^sm_(\d+)$", listed.stdout, re.MULTILINE)))

    def binary(self, name: str, text: str, architecture: int, options: tuple[str, ...] = OPTIONS) -> bytes:
        return self._run("-cubin", name, text, architecture, options)

    def ptx(self, name: str, text: str, architecture: int, options: tuple[str, ...] = OPTIONS) -> str:
        return self._run("-ptx", name, text, architecture, options).decode()

    def _run(self, kind: str, name: str, text: str, architecture: int, options: tuple[str, ...]) -> bytes:
        with TemporaryDirectory() as folder:
            source, made = Path(folder) / f"{name}.cu", Path(folder) / "made"
            source.write_text(text)
            command = [self.nvcc, *options, f"-arch={machine_target(architecture)}", kind, "-o", str(made), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S, check=False)
            assert done.returncode == 0, done.stderr[-8000:]
            return made.read_bytes()


def find_compiler() -> ByNvrtc | ByNvcc | None:
    """Returns NVRTC if it is installed, else nvcc."""
    try:
        return ByNvrtc(open_nvrtc())
    except (ImportError, UsageError):
        pass
    if libraries := _libraries():
        return ByNvrtc(Nvrtc(str(libraries[max(libraries)])))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT / "bin"))
    return None if nvcc is None else ByNvcc(nvcc)


def find_nvrtc(major: int) -> ByNvrtc | None:
    """Returns the NVRTC of CUDA `major`; others may be installed too."""
    path = _libraries().get(major)
    return None if path is None else ByNvrtc(Nvrtc(str(path)))


def _libraries() -> dict[int, Path]:
    """Returns the paths of NVRTC libraries in Python packages, by major version."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = (path for path in packages.glob("*/lib/libnvrtc.so.*") if path.suffix[1:].isdigit())
    return {int(path.suffix[1:]): path for path in found}
