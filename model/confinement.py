"""A seccomp filter and resource limits for child processes that handle untrusted input. The filter allows only system
calls for memory, time, open pipes and exit. A template that escapes from Jinja's sandbox, or an image that takes over a
decoder, cannot open files or sockets or start programs. The filter exists for Linux on x86-64 and aarch64."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_SET_NO_NEW_PRIVS: Final = 38
_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2
_LOAD: Final = 0x20  # Classic BPF: loads the 32-bit word at an offset in `struct seccomp_data`.
_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_FIRST_ARGUMENT_AT: Final = 16  # Offset of the low 32 bits of a call's first argument. Both machines are little-endian.
_ALLOW: Final = 0x7FFF0000
_REFUSE: Final = 0x00050000 | errno.EPERM
_MAX_FILES: Final = 16


@dataclass(frozen=True, slots=True)
class _Architecture:
    audit: int  # The kernel's AUDIT_ARCH_* number.
    calls: tuple[int, ...]
    prlimit: int  # Number of the call `prlimit`. A process may change only its own limits.


_ARCHITECTURES: Final = {
    # Names of the allowed system calls, in the order of their numbers:
    # read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn sched_yield mremap
    # madvise getpid exit gettimeofday getrusage times sigaltstack futex restart_syscall clock_gettime clock_getres
    # exit_group getrandom
    "x86_64": _Architecture(
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 39, 60, 96, 98, 100, 131, 202, 219, 228, 229, 231, 318),
        302,
    ),
    "aarch64": _Architecture(
        0xC00000B7,
        (
            *(63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 124, 216, 233, 172, 93, 169, 165, 153, 132),
            *(98, 128, 113, 114, 94, 278),
        ),
        261,
    ),
}


class _Program(ctypes.Structure):
    """The kernel's `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def limit_resources(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_FILES, _MAX_FILES))


def limit_cpu(seconds: int) -> None:
    """Limits this process to `seconds` more seconds of CPU time. The kernel's limit includes the time used so far."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, hard))


def confine() -> str | None:
    """Makes all system calls outside the filter's list fail with EPERM. Returns the reason if there is no filter."""
    machine = os.uname().machine
    architecture = _ARCHITECTURES.get(machine) if sys.platform == "linux" else None
    if architecture is None:
        return f"no system call filter is available on {sys.platform} {machine}"
    code = b"".join(_filter(architecture))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    for arguments in (
        (_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero),
    ):
        if prctl(*arguments) != 0:
            return f"the kernel refused the system call filter: {os.strerror(ctypes.get_errno())}"
    return None


def _filter(architecture: _Architecture) -> Iterable[bytes]:
    """Yields the filter's BPF instructions. They also refuse calls of other architectures, such as 32-bit x86."""
    refuse, allow = _instruction(_RETURN, _REFUSE), _instruction(_RETURN, _ALLOW)
    yield _instruction(_LOAD, _ARCHITECTURE_AT)
    yield _instruction(_EQUAL, architecture.audit, if_equal=1)
    yield refuse
    yield _instruction(_LOAD, _NUMBER_AT)
    for number in architecture.calls:
        yield _instruction(_EQUAL, number, otherwise=1)
        yield allow
    yield _instruction(_EQUAL, architecture.prlimit, if_equal=1)
    yield refuse
    yield _instruction(_LOAD, _FIRST_ARGUMENT_AT)
    yield _instruction(_EQUAL, 0, otherwise=1)
    yield allow
    yield refuse


def _instruction(code: int, value: int, *, if_equal: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_equal, otherwise, value)
