"""Checks the health of a container: a coordinator must accept requests, and a worker must listen.

Prints one line and exits with code 0 (healthy) or 1. Imports nothing of llamaclust, so that a check takes little time.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

_DEADLINE_S = 5.0
_LISTEN = "0A"


def arguments_of(process: int) -> list[str]:
    return [os.fsdecode(word) for word in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")]


def listening(process: int) -> Iterator[tuple[str, int]]:
    """Yields host and port of the TCP sockets on which the process listens. Source: proc_pid_net(5)."""
    sockets = {str(entry.readlink()) for entry in Path(f"/proc/{process}/fd").iterdir()}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTEN and f"socket:[{inode}]" in sockets:
                address, _, port = local.partition(":")
                words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
                host = socket.inet_ntop(family, b"".join(word.to_bytes(4, sys.byteorder) for word in words))
                yield host, int(port, 16)


def check_worker(process: int) -> str:
    """Raises OSError if neither the process nor a child listens. Does not connect: the worker would log that."""
    addresses = [*listening(process)]
    if not addresses:  # With `docker run --init`, the worker is the child of an init process.
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        addresses = [address for child in children for address in listening(int(child))]
    if not addresses:
        raise OSError("the worker listens at no address yet")
    return f"listens on {', '.join(f'{host} port {port}' for host, port in addresses)}"


def is_locked(path: Path) -> bool:
    """Tells whether a running process holds the lock of a cluster. A killed coordinator leaves its record."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def check_coordinator(state: Path) -> str:
    """Raises OSError if a cluster in this state directory accepts no requests."""
    records = [path for path in sorted(state.glob("*/cluster.json")) if is_locked(path.with_name("lock"))]
    if not records:
        raise OSError(f"no cluster is ready in {state}")
    for record in map(json.loads, (path.read_text() for path in records)):
        api = record["api"].replace("//0.0.0.0:", "//127.0.0.1:")
        certificate = record.get("api_certificate")
        context = None if certificate is None else _trusting(certificate)
        # Proxies that the environment names are not for this container's own address.
        opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
        opener.open(f"{api}/health", timeout=_DEADLINE_S).close()
    return "takes requests"


def _trusting(certificate: str) -> ssl.SSLContext:
    """Returns a context that trusts only this certificate. The names in the certificate are not checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context


def main() -> None:
    try:
        if "worker" in arguments_of(1):
            print(check_worker(1))
        else:
            print(check_coordinator(Path(os.environ["LLAMACLUST_STATE_DIR"])))
    except (OSError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
