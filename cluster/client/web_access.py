"""Proxies and trusted certificates of HTTP clients, from the environment and this user's clusters."""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.request import proxy_bypass

import httpx

from llamaclust.cluster.config.environment import environment, proxy_variables, trust_variables
from llamaclust.core.addresses import ANYWHERE, is_address, is_loopback, split_address
from llamaclust.core.errors import UsageError
from llamaclust.core.interfaces import own_addresses

Verify = str | PathLike[str] | ssl.SSLContext | None
"""A PEM file of certificates to trust, or an SSL context. None means the cluster's own certificate if it runs on this
machine, and otherwise the certificates that this machine trusts."""

DEFAULT_URL = "http://127.0.0.1:8080"
_CONNECT_S = 10.0
_NEVER_PROXIED = ("127.0.0.1", "localhost", "[::1]")
_SCHEMES = ("http", "https", "socks5", "socks5h")
_MOST_PORT = (1 << 16) - 1
_KEY_LOG = "SSLKEYLOGFILE"
_CURE = "give its file or the file of its authority by --ca-file, `verify=` or the variable SSL_CERT_FILE"


def http_options(base_url: str, api_key: str | None, timeout: float, verify: Verify = None) -> dict[str, Any]:
    """Returns httpx's arguments for a client of the HTTP API at `base_url`, which may end in `/v1`. Raises UsageError
    if the address, the key, a file or an environment variable is unusable."""
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise UsageError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{base_url!r} is not the address of an HTTP server; write it like {DEFAULT_URL}")
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable() or not api_key.strip():
            raise UsageError("the API key is empty or has characters that are not allowed in a key")
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "base_url": url,
        "headers": headers,
        "timeout": timeouts(timeout, timeout),
        "limits": httpx.Limits(max_keepalive_connections=20),  # Waiting answers may need any number of connections.
        **web_options(url, trust(url, verify)),
    }


def timeouts(timeout: float, read_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S), read=min(timeout, read_s))


def web_options(url: httpx.URL | None, verify: ssl.SSLContext | None = None) -> dict[str, Any]:
    """Returns httpx's arguments for requests to `url`, or to any server if `url` is None. `verify` defaults to the
    certificates that this machine trusts. Raises UsageError if an environment variable is unusable."""
    trusted = verify or authorities()
    if url is not None and _is_this_machine(url.host):
        return {"trust_env": False, "verify": trusted}
    for name, value in proxy_variables().items():
        wrong = _wrong_hosts(value) if name.lower() == "no_proxy" else _wrong_proxy(value)
        if wrong:
            raise UsageError(f"{name}={value} {wrong}; correct or unset this environment variable")
    return {"verify": trusted, "mounts": {f"all://{host}": None for host in _NEVER_PROXIED}}


def _is_this_machine(host: str) -> bool:
    return is_loopback(host) or host in ANYWHERE or (is_address(host) and host in own_addresses())


def _wrong_proxy(value: str) -> str:
    try:
        url = httpx.URL(value if "://" in value else f"http://{value}")
    except httpx.InvalidURL as error:
        return f"is not the address of a proxy ({error})"
    if url.scheme not in _SCHEMES or not url.host or not 0 <= (url.port or 0) <= _MOST_PORT:
        return "is not the address of a proxy, such as http://HOST:PORT"
    if url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "is a SOCKS proxy, which needs the package socksio (`pip install socksio`)"
    return ""


def _wrong_hosts(value: str) -> str:
    for host in filter(None, map(str.strip, value.split(","))):
        try:
            if not is_address(host) and "/" not in host:
                httpx.URL(f"all://*{host}")
        except httpx.InvalidURL as error:
            return f"contains {host!r}, which is not a valid host ({error})"
    return ""


def trust(url: httpx.URL, verify: Verify) -> ssl.SSLContext:
    if url.scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # For plain HTTP. Reading certificates takes 20 ms.
    if isinstance(verify, ssl.SSLContext):
        return verify
    if verify is None and (own := _own_certificates(url)):
        return _PinnedContext.of(own)
    return authorities(None if verify is None else Path(verify))


def authorities(file: Path | None = None) -> ssl.SSLContext:
    """Returns a context that trusts the CAs in `file` (default: this machine's). Raises UsageError for a bad file."""
    try:
        if file is not None:
            return ssl.create_default_context(cafile=file)
        context = httpx.create_ssl_context()
        context.load_default_certs()
    except OSError as error:
        reason = "the file holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        variables = trust_variables()
        names = [name for name in variables if file is None or name == _KEY_LOG]
        wrong = [name for name in names if variables[name] == error.filename]
        if file is None and not wrong:
            wrong = [name for name in names if name != _KEY_LOG]
        if wrong:
            raise UsageError(
                f"{wrong[0]}={variables[wrong[0]]} cannot be used: {reason}; correct or unset this variable"
            ) from error
        if file is None:
            raise
        raise UsageError(f"{file}: cannot read the certificates to trust: {reason}") from error
    return context


def _own_certificates(url: httpx.URL) -> list[Path]:
    from llamaclust.cluster.state.clusters import recorded_clusters

    records = recorded_clusters(environment().state_dir)
    return [Path(record.api_certificate) for record in records if record.api_certificate and _is_at(url, record.api)]


def _is_at(url: httpx.URL, api: str) -> bool:
    host, port = split_address(api.removeprefix("https://"))
    if (url.port or 443) != port:
        return False
    if host in ANYWHERE:
        return _is_this_machine(url.host)
    return url.host == host or (is_loopback(url.host) and is_loopback(host))


class _PinnedContext(ssl.SSLContext):
    """Trusts only the certificates in `files`, for any host name. Each connection reads the files again."""

    files: Sequence[Path]
    protocols: Sequence[str] = ()

    @classmethod
    def of(cls, files: Sequence[Path]) -> _PinnedContext:
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context.files, context.check_hostname = files, False
        return context

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        self.protocols = tuple(alpn_protocols)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return self._now().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._now().wrap_bio(*args, **kwargs)

    def _now(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        # An authority that is not in the files may have signed the certificate.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if self.protocols:
            context.set_alpn_protocols(self.protocols)
        for file in self.files:
            with suppress(OSError):  # A missing file means that the server is not trusted.
                context.load_verify_locations(file)
        return context


def proxy_note(error: httpx.HTTPError) -> str:
    """Returns a text that names the proxy of the failed request and the variable that sets it, or "" without one."""
    try:
        url = error.request.url
    except RuntimeError:  # The error belongs to no request.
        return ""
    variables = {name.lower(): (name, value) for name, value in proxy_variables().items()}
    name, value = variables.get(f"{url.scheme}_proxy") or variables.get("all_proxy") or ("", "")
    is_excluded = proxy_bypass(url.host, {"no": variables.get("no_proxy", ("", ""))[1]})
    if not name or is_excluded or _is_this_machine(url.host):
        return ""
    proxy = httpx.URL(value if "://" in value else f"http://{value}")
    shown = f"{proxy.scheme}://{proxy.netloc.decode()}"  # `netloc` excludes the password.
    return f"; the request went through the proxy {shown} of the variable {name}: check it, or unset the variable"


def explain_refusal(where: str, error: httpx.HTTPError) -> str | None:
    """Returns advice if the server's certificate is not trusted or the server does not use TLS, and otherwise None."""
    reason = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        why = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or reason
        return f"{where} shows a certificate that is not trusted here ({why}): {_CURE}"
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return f"{where} does not speak TLS: write http:// in its address"
    return None
