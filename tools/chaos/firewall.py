"""An nftables table that only this process can change. The kernel removes the table when the process ends."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from llamaclust.core.errors import LlamaclustError

_LIBRARY = "libnftables.so.1"
_CAP_NET_ADMIN = 12


class FirewallError(LlamaclustError):
    """Packets cannot be filtered on this machine."""


class Firewall:
    """Rules in the network namespace of this process. Raises FirewallError if the process may not add rules."""

    def __init__(self) -> None:
        self.table = f"inet llamaclust_chaos_{os.getpid()}"
        self._library = _load()
        self._context = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)
        try:
            self.run(f"add table {self.table} {{ flags owner; }}")
        except FirewallError as error:
            self._free()
            raise FirewallError(f"{error}; the test needs nftables of Linux 5.12 or newer") from None

    def run(self, commands: str) -> None:
        """Runs nftables commands. If one of them fails, none takes effect, and FirewallError is raised."""
        if self._library.nft_run_cmd_from_buffer(self._context, commands.encode()) != 0:
            lines = self._library.nft_ctx_get_error_buffer(self._context).decode(errors="replace").splitlines()
            raise FirewallError(f"nftables: {next(iter(lines), 'unknown error')}")

    def close(self) -> None:
        if self._context is not None:
            self.run(f"delete table {self.table}")
            self._free()

    def _free(self) -> None:
        self._library.nft_ctx_free(self._context)
        self._context = None


def _load() -> Any:
    if not _may_filter():
        raise FirewallError("filtering packets needs CAP_NET_ADMIN (root)")
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        raise FirewallError(f"{_LIBRARY} is not installed (Debian, Ubuntu: nftables)") from None
    context, text = ctypes.c_void_p, ctypes.c_char_p
    library.nft_ctx_new.argtypes, library.nft_ctx_new.restype = [ctypes.c_uint32], context
    library.nft_run_cmd_from_buffer.argtypes = [context, text]
    library.nft_ctx_get_error_buffer.argtypes, library.nft_ctx_get_error_buffer.restype = [context], text
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [context]
    return library


def _may_filter() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_NET_ADMIN & 1)
    return False
