from __future__ import annotations

import ipaddress
import re

from llamaclust.core.errors import UsageError

ANYWHERE = ("0.0.0.0", "::")
"""Wildcard hosts. A listener on a wildcard host accepts connections to every address of the machine."""

_LABEL = r"[A-Za-z0-9_-]{1,63}"
_NAME = rf"(?=[^:]{{1,255}}:){_LABEL}(?:\.{_LABEL})*\.?"
_ADDRESS = re.compile(rf"(\[[0-9a-fA-F:.]{{2,60}}(?:%[^\]\s]{{1,32}})?\]|{_NAME}):(\d{{1,5}})", re.ASCII)
_MOST_SHOWN = 64
JOIN_PORT = 7100
LASTING = "give a host name, an IPv4 address, or an IPv6 address that does not begin with fe80"


class AddressError(UsageError, ValueError):
    """The value is not an address of the form HOST:PORT, or its host is link-local."""


def split_address(value: object, example: str = "127.0.0.1:8080 or [::1]:8080") -> tuple[str, int]:
    """Splits HOST:PORT. Raises AddressError for other text or a link-local host. The error shows `example`."""
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        shown = "an empty value" if value is None else repr(value)[:_MOST_SHOWN]
        raise AddressError(f"{shown} is not an address; write it like {example}")
    host = match[1].strip("[]")
    if is_link_local(host):
        raise AddressError(f"{host} is a link-local address, which other machines cannot use; {LASTING}")
    return host, int(match[2])


def joined_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bounded_host(host: str) -> str:
    """Returns the key for limits per host: an IPv4 address, the /64 network of an IPv6 address, or else `host`."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


def is_link_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "%" in host
    return address.version == 6 and (address.is_link_local or "%" in host)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
