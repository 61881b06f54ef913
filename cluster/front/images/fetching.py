"""Fetches images over http(s), but only from public addresses. Limits the size and the time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from socket import SOCK_STREAM, getaddrinfo
from threading import BoundedSemaphore
from typing import Final

import httpx

from llamaclust.cluster.front.images.urls import ImageUrl
from llamaclust.cluster.front.text.sharing import hold_bytes
from llamaclust.core.background import in_background
from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.version import VERSION
from llamaclust.model.images.settings import MAX_IMAGE_BYTES
from llamaclust.wire.rpc.deadlines import deadline

_MAX_S: Final = 20.0
"""Maximum seconds for fetching all images of a request."""
_LOOKUP_S: Final = 10.0
_LOOKUPS: Final = BoundedSemaphore(32)
"""Limits concurrent lookups of host names. A lookup may continue after its deadline if the name server is silent."""
_ONE_USE: Final = httpx.Limits(max_keepalive_connections=0)
"""Connections are not reused. Hosts may share an address, and a certificate is checked only when a connection opens."""
_INTERNET: Final = IPv6Network("2000::/3")
"""IPv6 addresses on the internet, except for `_BLOCKS`."""
_NAT64: Final = IPv6Network("64:ff9b::/96")
_BLOCKS: Final = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
    *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
)
"""All blocks of the IANA registries of special-purpose and multicast addresses within IPv4 and `_INTERNET`. Blocks that
the registries call global are included, because they have relays and name servers, but no images."""
_SPECIAL: Final = tuple(map(ip_network, _BLOCKS))
_PLAIN: Final = "identity"
_HEADERS: Final = {"accept": "image/*", "accept-encoding": _PLAIN, "user-agent": f"llamaclust/{VERSION}"}


async def fetch_images(urls: Sequence[str], most_bytes: int) -> dict[str, bytes]:
    """Fetches images. Raises DeadlineError, or ParameterError if images cannot be fetched or exceed `most_bytes`."""
    images: dict[str, bytes] = {}
    left_bytes = most_bytes
    try:
        async with asyncio.timeout(_MAX_S), _client() as client:
            for url in urls:
                try:
                    images[url] = await _fetched(client, ImageUrl.parse(url), min(left_bytes, MAX_IMAGE_BYTES))
                except (ValueError, httpx.HTTPError, OSError) as error:
                    raise ParameterError("messages", f"{url[:200]}: {error or type(error).__name__}") from error
                left_bytes -= len(images[url])
    except TimeoutError:
        what = f"fetching {len(urls)} images took longer than {_MAX_S:g} s"
        raise DeadlineError(f"{what}; send them as data URLs") from None
    return images


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(headers=_HEADERS, timeout=None, limits=_ONE_USE, trust_env=False, follow_redirects=False)


async def _fetched(client: httpx.AsyncClient, url: ImageUrl, most_bytes: int) -> bytes:
    # Connects to the address that is checked here, because a second lookup could return another.
    address = await _public_address(url)
    request = client.build_request(
        "GET",
        httpx.URL(scheme=url.scheme, host=address, port=url.port, raw_path=url.target.encode()),
        headers={"host": url.authority},
        extensions={"sni_hostname": url.host},
    )
    reply = await client.send(request, stream=True)
    try:
        if reply.is_redirect:
            target = reply.headers.get("location", "")[:200]
            raise ValueError(f"expected an image, found a redirect to {target}; give the final URL")
        if reply.status_code != httpx.codes.OK:
            raise ValueError(f"expected status 200 from the host, found {reply.status_code}")
        encoding = reply.headers.get("content-encoding", _PLAIN)
        if encoding.lower() != _PLAIN:
            raise ValueError(f"expected an image without compression, found content-encoding {encoding[:60]}")
        return await _read(reply, most_bytes)
    finally:
        await reply.aclose()


async def _read(reply: httpx.Response, most_bytes: int) -> bytes:
    data, hold = bytearray(), hold_bytes.get()
    async for part in reply.aiter_raw():
        data += part
        if hold is not None:
            hold(len(part))
        if len(data) > most_bytes:
            raise ValueError(f"expected an image of at most {most_bytes} bytes, found more; send a smaller image")
    return bytes(data)


async def _public_address(url: ImageUrl) -> str:
    """Looks up the address of a host. Raises DeadlineError, or ValueError if the host is unknown or not public."""
    what = f"looking up the host {url.host}"
    if not _LOOKUPS.acquire(blocking=False):
        raise DeadlineError(f"{what}: too many earlier lookups still wait for name servers; send images as data URLs")
    try:
        async with deadline(what, _LOOKUP_S):
            addresses = await asyncio.wrap_future(in_background(partial(_look_up, url)))
    except OSError as error:
        raise ValueError(f"the host is not found: {error.strerror or error}") from error
    for address in addresses:
        if not is_public(address):
            raise ValueError(f"expected a host on the internet, found the address {address}, which is not public")
    return addresses[0]


def _look_up(url: ImageUrl) -> list[str]:
    try:
        return [str(place[0]) for *_, place in getaddrinfo(url.host, url.port, type=SOCK_STREAM)]
    finally:
        _LOOKUPS.release()


def is_public(address: str) -> bool:
    """Returns True if the address is on the internet, or is the NAT64 form of such an address. Mapped, 6to4 and Teredo
    addresses are never public."""
    parsed: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if parsed in _NAT64:
        parsed = IPv4Address(int(parsed) & 0xFFFFFFFF)
    if isinstance(parsed, IPv6Address) and parsed not in _INTERNET:
        return False
    return not any(parsed in block for block in _SPECIAL)
