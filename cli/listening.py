"""The options --port and --lan of `up`: the API's address, and an API key for devices on the local network."""

from __future__ import annotations

import json
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path

from llamaclust.cli.keys import key_file
from llamaclust.cli.terminal import printable
from llamaclust.cluster.config.cluster_config import ClusterConfig, cluster_document
from llamaclust.cluster.state.api_keys import add_key, named_keys
from llamaclust.core.addresses import ANYWHERE, AddressError, is_loopback, joined_address, split_address

_HOST_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_OWNER, _KEY_NAME = "owner", "lan"


def listen_overrides(file: Path | None, overrides: list[str], port: int | None, *, lan: bool) -> list[str]:
    """Returns the KEY=VALUE overrides for --port and --lan. With --lan, other machines with a key can use the API."""
    values = cluster_document(file, overrides).values
    listen = values.get("listen", ClusterConfig.model_fields["listen"].default)
    more = []
    with suppress(AddressError):  # The later check of the whole cluster file reports an invalid address.
        host, given = split_address(listen)
        wanted = joined_address(ANYWHERE[0] if lan and is_loopback(host) else host, given if port is None else port)
        more.append(f"listen={json.dumps(wanted)}")
    if lan and values.get("api_keys_file") is None:
        more.append(f"api_keys_file={json.dumps(str(key_file()))}")
    if lan and values.get("allowed_hosts") is None and (names := _own_names()):
        more.append(f"allowed_hosts={json.dumps(names)}")
    return more


def _own_names() -> list[str]:
    name = socket.gethostname().partition(".")[0].lower()
    return [name, f"{name}.local"] if _HOST_NAME.fullmatch(name) else []


def lan_key(path: Path) -> str:
    """Returns the API key named `lan`, or a text that tells where to find a key. If the file has no keys, first
    adds the keys `owner` and `lan`."""
    # The first key of a file has more permissions than the others, so it must not be `lan`.
    keys = named_keys(path) or [add_key(path, name) for name in (_OWNER, _KEY_NAME)]
    own = next((each for each in keys if each.name == _KEY_NAME), None)
    if own is None:
        return f"a key in {printable(str(path))}; `llamaclust keys add NAME` makes and prints another key"
    return own.key if sys.stderr.isatty() else f"the line below `# {_KEY_NAME}` in {printable(str(path))}"
