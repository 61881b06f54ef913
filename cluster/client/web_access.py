"""How HTTP clients reach servers: proxies and certificates, of which the environment has a say."""

from __future__ import annotations

import importlib.util
import ssl
from ipaddress import ip_address
from typing import Any

import httpx

from llamaclust.cluster.client.trust import default_trust
from llamaclust.cluster.config.environment import proxy_variables
from llamaclust.core.addresses import ANYWHERE, is_loopback
from llamaclust.core.errors import UsageError
from llamaclust.core.this_machine import own_addresses

_NEVER_PROXIED = ("127.0.0.1", "localhost", "[::1]")
_SCHEMES = ("http", "https", "socks5", "socks5h")
_MOST_PORT = (1 << 16) - 1


def web_options(url: httpx.URL | None, verify: ssl.SSLContext | None = None) -> dict[str, Any]:
    """Arguments of httpx's clients that reach `url`, or any server (None), through the proxies of the environment; this
    machine itself without them. `verify`: the certificates to trust, by default those of this machine.

    UsageError that names the variable which cannot be used.
    """
    trusted = verify or default_trust()
    if url is not None and is_this_machine(url.host):
        return {"trust_env": False, "verify": trusted}
    for name, value in proxy_variables().items():
        wrong = _wrong_hosts(value) if name.lower() == "no_proxy" else _wrong_proxy(value)
        if wrong:
            raise UsageError(f"{name}={value}: {wrong}; correct or unset this environment variable")
    return {"verify": trusted, "mounts": {f"all://{host}": None for host in _NEVER_PROXIED}}


def is_this_machine(host: str) -> bool:
    return is_loopback(host) or host in ANYWHERE or (_is_ip(host) and host in own_addresses())


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _wrong_proxy(value: str) -> str:
    """The reason why httpx would fail with this proxy; empty where it can be used."""
    try:
        url = httpx.URL(value if "://" in value else f"http://{value}")
    except httpx.InvalidURL as error:
        return f"not the address of a proxy ({error})"
    if url.scheme not in _SCHEMES or not url.host or not 0 <= (url.port or 0) <= _MOST_PORT:
        return "not the address of a proxy; write it like http://HOST:PORT"
    if url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "proxies of SOCKS need the package socksio (`pip install socksio`)"
    return ""


def _wrong_hosts(value: str) -> str:
    """Returns the reason why httpx would fail with this list of hosts without a proxy; empty if there is none."""
    for host in filter(None, map(str.strip, value.split(","))):
        try:
            if not _is_ip(host) and "/" not in host:
                httpx.URL(f"all://*{host}")
        except httpx.InvalidURL as error:
            return f"{host} is not a host ({error})"
    return ""
