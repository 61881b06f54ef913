"""Compiles with NVRTC. CuPy is not used for this, since it flushes subnormals to zero (`-ftz=true`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.kernels.cuda.runtime.sources import OPTIONS

_ALL_ON_DEVICE = "--device-as-default-execution-space"
_NOT_THERE = "device cuda needs NVRTC, which is not installed: pip install 'llamaclust[cuda13]' (or cuda12)"
_HOPPER = 90
_OLDEST = (12, 0)
"""The first version that supports C++20."""


def machine_target(architecture: int, kind: str = "sm") -> str:
    """Returns the compiler's name for an architecture. The suffix "a" enables instructions that only Hopper has."""
    return f"{kind}_{architecture}a" if architecture == _HOPPER else f"{kind}_{architecture}"


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code for one architecture ("cubin"), or PTX for an architecture that NVRTC does not know."""

    kind: str
    data: bytes


class Nvrtc:
    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = major.value, minor.value
        if self.version < _OLDEST:
            raise UsageError(f"{path} is NVRTC {major.value}.{minor.value}; kernels need NVRTC of CUDA 12 or 13")

    @property
    def architectures(self) -> tuple[int, ...]:
        """The architectures for which the library makes machine code, in ascending order. For example, 75 means 7.5."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers))
        return tuple(sorted(numbers))

    def compile(self, name: str, text: str, architecture: int, options: Sequence[str] = OPTIONS) -> Binary:
        """Compiles to machine code, or to PTX for a GPU newer than NVRTC. Raises LlamaclustError with NVRTC's log."""
        known = self.architectures
        kind = "cubin" if architecture in known else "ptx"
        target = (
            machine_target(architecture)
            if kind == "cubin"
            else f"compute_{max(one for one in known if one < architecture)}"
        )
        return Binary(kind, self.translate(kind, name, text, (*options, f"--gpu-architecture={target}")))

    def translate(self, kind: str, name: str, text: str, options: Sequence[str]) -> bytes:
        program = ctypes.c_void_p()
        source, given = text.encode(), [option.encode() for option in (*options, _ALL_ON_DEVICE)]
        made = self._library.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), 0, None, None)
        self._check(made)
        try:
            array = (ctypes.c_char_p * len(given))(*given)
            if self._library.nvrtcCompileProgram(program, len(given), array) != 0:
                log = self._result(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise LlamaclustError(f"NVRTC {self.version} cannot compile {name} ({' '.join(options)}): {log}")
            return self._result(program, "CUBIN" if kind == "cubin" else "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _result(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _check(self, status: int) -> None:
        if status != 0:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise LlamaclustError(f"NVRTC: {self._library.nvrtcGetErrorString(status).decode()}")


def open_nvrtc() -> Nvrtc:
    """Opens the NVRTC library that CuPy would use. Raises UsageError if NVRTC is not installed."""
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ImportError as error:
        raise UsageError(_NOT_THERE) from error
    try:
        found = load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError as error:
        raise UsageError(_NOT_THERE) from error
    assert found.abs_path is not None
    return Nvrtc(found.abs_path)
