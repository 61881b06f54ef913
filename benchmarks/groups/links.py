"""Links between the members of a group: mutual TLS with keys of a cluster, in C++ (`exchange.cpp`) by OpenSSL."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.wire.security.credentials import Principal

_SOURCE = Path(__file__).parent / "exchange.cpp"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_BUFFER_BYTES = 1 << 20
_CONNECT_S = 60.0
_HEADER = Path("/usr/include/openssl/ssl.h")


def missing() -> str | None:
    """Why the links cannot be built here."""
    if compiler() is None:
        return "no C++ compiler found"
    return None if _HEADER.exists() else "OpenSSL's headers are not here (Debian, Ubuntu: libssl-dev)"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def build(folder: Path) -> Path:
    """The library; UsageError where it cannot be built."""
    if (reason := missing()) is not None:
        raise UsageError(reason)
    library, command = folder / "exchange.so", compiler()
    assert command is not None
    arguments = [command, *_FLAGS, str(_SOURCE), "-o", str(library), "-lssl", "-lcrypto"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"{_SOURCE}: {done.stderr.strip()}")
    return library


def write_keys(folder: Path, members: int) -> list[str]:
    """A key and a certificate for each member, by an authority made for the purpose; the members' host names."""
    authority = Authority.open(folder / "authority")
    identities = [authority.identity(Principal(f"member{number}")) for number in range(members)]
    (folder / "ca.crt").write_bytes(identities[0].ca)
    for number, identity in enumerate(identities):
        (folder / f"{number}.crt").write_bytes(identity.pair.certificate)
        (folder / f"{number}.key").touch(mode=0o600)
        (folder / f"{number}.key").write_bytes(identity.pair.private_key)
    return [identity.principal.host(identity.cluster) for identity in identities]


class Links:
    """A member's connections to all others."""

    def __init__(self, folder: Path, member: int, *, spins: bool) -> None:
        """With the library and the keys in `folder`. A member that `spins` has a core of its own."""
        self._library = ctypes.CDLL(str(folder / "exchange.so"))
        self._library.group_error.restype = ctypes.c_char_p
        self._library.group_open.restype = ctypes.c_void_p
        for name in ("group_connect", "group_add", "group_gather"):
            getattr(self._library, name).restype = ctypes.c_int64
        handle = self._library.group_open(os.fsencode(folder), member, int(spins))
        if handle is None:
            raise LlamaclustError(self._error())
        self._group = ctypes.c_void_p(handle)
        self._gather = self._library.group_gather
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._kept: list[NDArray[np.generic]] = []
        self._member = member
        self.port: int = self._listener.getsockname()[1]
        self.delay_ns, self._byte_ns = ctypes.c_int64(0), ctypes.c_double(0)

    def connect(self, ports: Sequence[int], hosts: Sequence[str]) -> None:
        """To members before this one; those behind it connect to it, and say by a byte which one they are.
        LlamaclustError where one is not there in time."""
        try:
            for other in range(self._member):
                connection = socket.create_connection(("127.0.0.1", ports[other]), _CONNECT_S)
                connection.sendall(bytes([self._member]))
                self._open(connection, other, hosts[other], accepts=False)
            self._listener.settimeout(_CONNECT_S)
            for _ in range(self._member + 1, len(ports)):
                connection, _ = self._listener.accept()
                connection.settimeout(_CONNECT_S)
                (other,) = connection.recv(1)
                self._open(connection, other, hosts[other], accepts=True)
        except (OSError, ValueError) as error:
            raise LlamaclustError(f"member {self._member} has no link to another: {error}") from error

    def _open(self, connection: socket.socket, other: int, host: str, *, accepts: bool) -> None:
        connection.settimeout(None)  # OpenSSL reads and writes itself
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", int(_CONNECT_S), 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # all members send before they receive
            connection.setsockopt(socket.SOL_SOCKET, buffer, _BUFFER_BYTES)
        self._sockets.append(connection)
        arguments = self._group, connection.fileno(), other, host.encode(), int(accepts)
        self._checked(self._library.group_connect(*arguments))

    def add(self, own: NDArray[np.float32], whole: NDArray[np.float32], borders: Sequence[int]) -> ctypes.c_int:
        """A row of which member i computes columns [borders[i], borders[i + 1]), this one in `own`; `gather` fills
        `whole`."""
        places = np.array(borders, np.int32)
        self._kept += [own, whole, places]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (own, whole, places)]
        arguments = self._group, *pointers, len(borders) - 1
        return ctypes.c_int(self._checked(self._library.group_add(*arguments)))

    def set_link(self, round_trip_ms: float, gbit_s: float) -> None:
        """How long messages take from now on: half a round trip, and a sender's messages one after the other; 0: no
        more than they do."""
        self.delay_ns = ctypes.c_int64(round(round_trip_ms / 2 * 1e6))
        self._byte_ns = ctypes.c_double(8 / gbit_s if gbit_s else 0)

    def gather(self, row: ctypes.c_int) -> int:
        """Nanoseconds until all have what all have computed."""
        return self._checked(self._gather(self._group, row, self.delay_ns, self._byte_ns))

    def _checked(self, result: int) -> int:
        if result < 0:
            raise LlamaclustError(self._error())
        return result

    def _error(self) -> str:
        text: bytes = self._library.group_error()
        return text.decode()
