"""The TLS certificate of the API. It is self-signed, or comes from PEM files that are read again after a change."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llamaclust.cluster.state.directory import write_private
from llamaclust.core.addresses import ANYWHERE, is_address
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.interfaces import own_addresses
from llamaclust.core.regular_file import file_version, open_regular, read_bytes
from llamaclust.wire.security.certificates import load_private, private_pem
from llamaclust.wire.security.server_context import server_context

_LOOK_S: Final = 1.0
_RETRY_S: Final = 60.0
"""Seconds until an unusable certificate is read again."""
_END_S: Final = 1.0
_MOST_BYTES: Final = 1 << 20
_WARNING: Final = timedelta(days=7)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    certificate: Path  # The server's certificate first, then the certificates of the authorities that signed it.
    key: Path

    @property
    def version(self) -> tuple[int, ...]:
        return (*file_version(self.certificate), *file_version(self.key))


@dataclass(frozen=True, slots=True)
class LoadedCertificate:
    context: ssl.SSLContext
    pem: str  # The server's certificate, without those of authorities.
    fingerprint: str  # SHA-256 in the form that browsers and OpenSSL show.
    ends_at: datetime
    version: tuple[int, ...]  # Version of the files. See `file_version`.

    @classmethod
    def of(cls, files: CertificateFiles) -> LoadedCertificate:
        """Reads the files. Raises UsageError if a file is unusable or the key does not match the certificate."""
        version = files.version
        is_one_file = files.key == files.certificate
        chain = _read(files.certificate, is_private=is_one_file)
        key = chain if is_one_file else _read(files.key, is_private=True)
        try:
            certificate = x509.load_pem_x509_certificate(chain)
        except (ValueError, x509.InvalidVersion) as error:
            raise UsageError(f"{files.certificate} holds no certificate in PEM") from error
        _check_key(files, certificate, key)
        _check_time(files.certificate, certificate)
        try:
            both = chain if is_one_file else key + b"\n" + chain
            context = server_context(both, ssl.TLSVersion.TLSv1_2)
        except OSError as error:
            reason = error.reason if isinstance(error, ssl.SSLError) else error
            raise UsageError(f"the certificate {files.certificate} cannot be used: {reason}") from error
        context.set_alpn_protocols(["http/1.1"])
        pem = certificate.public_bytes(Encoding.PEM).decode()
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex(":").upper()
        return cls(context, pem, fingerprint, certificate.not_valid_after_utc, version)


class ServerCertificate:
    """The certificate in use. If its files change and are unusable, the previous certificate stays in use."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._loaded = LoadedCertificate.of(files)
        self._seen = self._done = self._loaded.version
        self._failed: tuple[int, ...] | None = None
        self._retry_at_s = 0.0
        self._published: Path | None = None
        self._has_warned = False

    @property
    def context(self) -> ssl.SSLContext:
        return self._loaded.context

    @property
    def fingerprint(self) -> str:
        return self._loaded.fingerprint

    def publish(self, path: Path) -> None:
        """Writes the certificate to `path` now and after each change. Raises LlamaclustError if writing fails."""
        self._published = path
        self._publish()

    @contextmanager
    def watched(self) -> Iterator[None]:
        end = threading.Event()

        def watch() -> None:
            while not end.wait(_LOOK_S):
                self.look()

        thread = threading.Thread(target=watch, name="certificate", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join(_END_S)

    def look(self) -> None:
        """Reads the files again if they have changed. Warns before the certificate expires."""
        version, last = self._files.version, self._seen
        self._seen = version
        must_wait = version == self._failed and time.monotonic() < self._retry_at_s
        if version == last and version != self._done and not must_wait:
            self._renew(version)
        left = self._loaded.ends_at - datetime.now(UTC)
        if left < _WARNING and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s: the certificate expires at %s: renew it", self._files.certificate, _shown(self._loaded.ends_at)
            )

    def _renew(self, version: tuple[int, ...]) -> None:
        failure = "the API keeps its previous certificate"
        try:
            if version != self._loaded.version:
                self._load()
            failure = "the API's new certificate could not be published to this user's programs"
            self._publish()
        except Exception as error:  # noqa: BLE001  The thread must continue after any error.
            if version != self._failed:
                _log.warning("%s: %s", failure, error, exc_info=not isinstance(error, LlamaclustError))
            self._failed, self._retry_at_s = version, time.monotonic() + _RETRY_S
        else:
            self._done, self._failed = version, None

    def _load(self) -> None:
        self._loaded = LoadedCertificate.of(self._files)
        self._has_warned, self._failed = False, None
        _log.info("the API has a new certificate: SHA-256 %s", self.fingerprint)

    def _publish(self) -> None:
        if self._published is not None:
            write_private(self._published, self._loaded.pem)


def _read(path: Path, *, is_private: bool = False) -> bytes:
    try:
        with open_regular(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if is_private and mode & 0o007:
        raise UsageError(f"all users of this machine can read the private key {path}; run `chmod o= {path}`")
    return data


def _check_key(files: CertificateFiles, certificate: x509.Certificate, pem: bytes) -> None:
    try:
        is_its_key = load_pem_private_key(pem, None).public_key() == certificate.public_key()
    except TypeError as error:  # The key needs a password.
        what = f"the private key {files.key} is protected by a password"
        raise UsageError(f"{what}; remove the password with `openssl pkey -in {files.key} -out FILE`") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{files.key} holds no private key in PEM") from error
    if not is_its_key:
        raise UsageError(f"{files.key} is not the key of the certificate in {files.certificate}")


def _check_time(path: Path, certificate: x509.Certificate) -> None:
    begin, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if not begin <= now <= end:
        valid = f"the certificate {path} is valid from {_shown(begin)} to {_shown(end)}"
        raise UsageError(f"{valid}, but this machine's clock says {_shown(now)}; renew it, or set the clock")


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


_LIFE = timedelta(days=820)
"""Validity of a self-signed certificate. Some clients refuse a certificate that is valid for more than 825 days."""
_REST = timedelta(days=30)
"""A self-signed certificate that expires within this time is replaced when the cluster starts."""
_SKEW = timedelta(days=1)
_MOST_NAMES = 256
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


def certificate_names(listen_hosts: Sequence[str], allowed_hosts: Sequence[str]) -> list[str]:
    """Returns the host names and addresses by which clients may reach an API that listens on `listen_hosts`."""
    here = [name for host in listen_hosts for name in (own_addresses() if host in ANYWHERE else [host])]
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *here, *allowed_hosts]
    return _unique(str(ipaddress.ip_address(name)) if is_address(name) else name.lower() for name in names)


def keep_self_signed(path: Path, names: Sequence[str]) -> None:
    """Makes sure that a PEM file holds a key and a self-signed certificate for `names`. Raises LlamaclustError."""
    former = _former(path)
    now = datetime.now(UTC)
    if former is not None:
        known = _names_of(former)
        is_valid = former.not_valid_before_utc <= now <= former.not_valid_after_utc - _REST
        if is_valid and set(names) <= set(known):
            return
        # Several machines may share the folder, so the old names are kept.
        names = _unique([*names, *known])
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key, names, now).public_bytes(Encoding.PEM)
    write_private(path, (private_pem(key) + certificate).decode())


def _unique(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if is_address(name) or _NAME.fullmatch(name)][:_MOST_NAMES]


def _former(path: Path) -> x509.Certificate | None:
    try:
        pem = read_bytes(path, _MOST_BYTES)
        certificate = x509.load_pem_x509_certificate(pem)
        is_of_key = certificate.public_key() == load_private(pem).public_key()
    except (OSError, ValueError):
        return None
    return certificate if is_of_key else None


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def _certificate(key: ec.EllipticCurvePrivateKey, names: Sequence[str], now: datetime) -> x509.Certificate:
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llamaclust API")])
    return (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _general_name(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if is_address(name) else x509.DNSName(name)
