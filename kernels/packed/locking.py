from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
from collections.abc import Sequence

from llamaclust.core.sizes import MIB
from llamaclust.kernels._native import Memory

_log = logging.getLogger(__name__)

_RAISE = "`ulimit -l unlimited` as root, LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 of docker run"


def lock_memory(memories: Sequence[Memory]) -> None:
    """Locks memory until it is freed, so that it is never swapped out. If the system refuses, logs what to do."""
    limit = _raise_limit()
    libc, locked, error = ctypes.CDLL(None, use_errno=True), 0, 0
    for memory in memories:
        if memory.bytes and libc.mlock(ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.bytes)) != 0:
            error = error or ctypes.get_errno()
        else:
            locked += memory.bytes
    text = (
        f"{locked // MIB} of {sum(memory.bytes for memory in memories) // MIB} MiB of packed weights are locked in RAM"
    )
    if error in (errno.ENOMEM, errno.EPERM) and limit != resource.RLIM_INFINITY:
        _log.warning("mlock: %s: RLIMIT_MEMLOCK is %d MiB; raise it: %s", text, limit // MIB, _RAISE)
    elif error:
        _log.warning("mlock: %s: %s", text, os.strerror(error))
    else:
        _log.info("%s", text)


def _raise_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return hard
