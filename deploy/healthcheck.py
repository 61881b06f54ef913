"""Checks the health of a container: a coordinator must accept requests, and a worker must accept connections.

Prints one line and exits with code 0 (healthy) or 1. Imports nothing of llamaclust, so that a check takes little time.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

_DEADLINE_S = 5.0


def arguments_of(process: int) -> list[str]:
    return [os.fsdecode(word) for word in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")]


def _listens(arguments: list[str]) -> Iterator[tuple[int, str]]:
    """Yields the index of each `--listen` or `--listen=ADDRESS`, and the address in that argument or ""."""
    for place, word in enumerate(arguments):
        option, _, value = word.partition("=")
        if option == "--listen":
            yield place, value


def check_worker(arguments: list[str]) -> str:
    """Raises OSError if no process listens at the address of --listen."""
    listen = next(after or arguments[place + 1] for place, after in _listens(arguments))
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    with socket.create_connection(("127.0.0.1" if host == "0.0.0.0" else host, int(port)), _DEADLINE_S):
        return f"listens on {listen}"


def check_coordinator(state: Path) -> str:
    """Raises OSError if a cluster in this state directory accepts no requests."""
    records = sorted(state.glob("*/cluster.json"))
    if not records:
        raise OSError(f"no cluster is ready in {state}")
    for record in map(json.loads, (path.read_text() for path in records)):
        api = record["api"].replace("//0.0.0.0:", "//127.0.0.1:")
        certificate = record.get("api_certificate")
        context = None if certificate is None else _trusting(certificate)
        urllib.request.urlopen(f"{api}/health", timeout=_DEADLINE_S, context=context).close()
    return "takes requests"


def _trusting(certificate: str) -> ssl.SSLContext:
    """Returns a context that trusts only this certificate. The names in the certificate are not checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context


def main() -> None:
    arguments = arguments_of(1)
    try:
        if "worker" in arguments and list(_listens(arguments)):
            print(check_worker(arguments))
        else:
            print(check_coordinator(Path(os.environ["LLAMACLUST_STATE_DIR"])))
    except (OSError, URLError) as error:
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
