"""Which certificates a client of an HTTPS address trusts."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import httpx

from llamaclust.cluster.config.environment import trust_variables
from llamaclust.core.addresses import ANYWHERE, is_loopback, split_address
from llamaclust.core.errors import UsageError
from llamaclust.core.this_machine import own_addresses

Verify = str | PathLike[str] | ssl.SSLContext | None
"""A PEM file of certificates to trust, or a context; None: those that this machine trusts, and for a cluster that
runs here its own."""

_KEY_LOG = "SSLKEYLOGFILE"
_CURE = "give its file, or its authority's, by --ca-file, `verify=` or the environment variable SSL_CERT_FILE"


def trust(url: httpx.URL, verify: Verify) -> ssl.SSLContext:
    """For httpx's `verify`. UsageError for a file that cannot be used."""
    if url.scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody and reads no file, which would take 20 ms
    if isinstance(verify, ssl.SSLContext):
        return verify
    if verify is not None:
        return file_trust(Path(verify))
    own = _own_certificates(url)
    if own:
        return _pinned(own)
    return default_trust()


def default_trust() -> ssl.SSLContext:
    """Trusts the authorities that this machine trusts. UsageError names the environment variable that cannot be
    used."""
    try:
        context = httpx.create_ssl_context()
        context.load_default_certs()
    except OSError as error:
        variables = trust_variables()
        name = next((name for name, value in variables.items() if value == error.filename), None)
        name = name or next((name for name in variables if name != _KEY_LOG), None)
        if name is None:
            raise
        raise UsageError(f"{name}={variables[name]}: {_reason(error)}; correct or unset this variable") from error
    return context


def file_trust(path: Path) -> ssl.SSLContext:
    """Trusts the authorities of a PEM file alone. UsageError if it cannot be read."""
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        log = trust_variables().get(_KEY_LOG)
        if log is not None and error.filename == log:
            raise UsageError(f"{_KEY_LOG}={log}: {_reason(error)}; correct or unset this variable") from error
        raise UsageError(f"{path}: cannot read the certificates to trust: {_reason(error)}") from error


def _reason(error: OSError) -> str | None:
    return "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror


def _own_certificates(url: httpx.URL) -> list[Path]:
    """Of clusters of this user that have this address, one that was killed among them."""
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.state.clusters import recorded_clusters

    records = recorded_clusters(environment().state_dir)
    return [Path(record.api_certificate) for record in records if record.api_certificate and _is_at(url, record.api)]


def _is_at(url: httpx.URL, api: str) -> bool:
    host, port = split_address(api.removeprefix("https://"))
    if (url.port or 443) != port:
        return False
    if host in ANYWHERE:
        return url.host == host or is_loopback(url.host) or url.host in own_addresses()
    return url.host == host or (is_loopback(url.host) and is_loopback(host))


class _PinnedContext(ssl.SSLContext):
    """Trusts the certificates in files and no others, whatever their names. Each connection has a context of its own
    and reads them again: they may have been renewed, and former ones count no more."""

    files: Sequence[Path]
    protocols: Sequence[str] = ()

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        self.protocols = tuple(alpn_protocols)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return self._now().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._now().wrap_bio(*args, **kwargs)

    def _now(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an authority may have signed it
        if self.protocols:
            context.set_alpn_protocols(self.protocols)
        for file in self.files:
            with suppress(OSError):  # then the server is not trusted
                context.load_verify_locations(file)
        return context


def _pinned(files: Sequence[Path]) -> ssl.SSLContext:
    context = _PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.files = files
    context.check_hostname = False
    return context


def explain_refusal(url: str, error: httpx.HTTPError) -> str | None:
    """What to do about a server that speaks TLS in another way; None where that is not why."""
    reason = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        why = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or reason
        return f"{url} shows a certificate that is not trusted here ({why}): {_CURE}"
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return f"{url} does not speak TLS: write http:// in its address"
    return None
