"""Health check of the image's program: a coordinator accepts requests, a worker accepts connections.

Exit code 0 or 1, and one line. It imports nothing of the program, so that it costs little each time.
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
    """Where --listen stands, and what stands in the same word."""
    for place, word in enumerate(arguments):
        option, _, value = word.partition("=")
        if option == "--listen":
            yield place, value


def check_worker(arguments: list[str]) -> str:
    """Raises OSError where no process listens at --listen."""
    listen = next(after or arguments[place + 1] for place, after in _listens(arguments))
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    with socket.create_connection(("127.0.0.1" if host == "0.0.0.0" else host, int(port)), _DEADLINE_S):
        return f"listens on {listen}"


def check_coordinator(state: Path) -> str:
    """Raises OSError where a cluster of this state directory takes no requests."""
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
    """This certificate alone, whatever its names."""
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
