"""A certificate of the API's port that no authority signs: made once, kept in the cluster's folder."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llamaclust.cluster.state.directory import write_private
from llamaclust.core.addresses import ANYWHERE
from llamaclust.core.regular_file import read_bytes
from llamaclust.core.this_machine import own_addresses
from llamaclust.wire.security.certificates import load_private, private_pem

_LIFE = timedelta(days=820)
"""Some clients refuse certificates of more than 825 days."""
_REST = timedelta(days=30)
"""A start makes a new one where less is left."""
_SKEW = timedelta(days=1)
_MOST_NAMES = 256
_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


def certificate_names(listen_hosts: Sequence[str], allowed_hosts: Sequence[str]) -> list[str]:
    """Names and addresses by which clients may call an API that listens there."""
    here = [name for host in listen_hosts for name in (own_addresses() if host in ANYWHERE else [host])]
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *here, *allowed_hosts]
    return _unique(name.lower() for name in names)


def keep_self_signed(path: Path, names: Sequence[str]) -> None:
    """A file of mode 0600 with a private key and a certificate for these names, in PEM. One that is there stays while
    it is good for them; a new one has its names as well, since several machines may share the folder.

    LlamaclustError where the file cannot be written."""
    former = _read(path)
    now = datetime.now(UTC)
    if former is not None:
        known = _names_of(former)
        is_valid = former.not_valid_before_utc <= now <= former.not_valid_after_utc - _REST
        if is_valid and set(names) <= set(known):
            return
        names = _unique([*names, *known])
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key, names, now).public_bytes(Encoding.PEM)
    write_private(path, (private_pem(key) + certificate).decode())


def _unique(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if _is_ip(name) or _NAME.fullmatch(name)][:_MOST_NAMES]


def _read(path: Path) -> x509.Certificate | None:
    """None where the file is missing or damaged."""
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
    return x509.IPAddress(ipaddress.ip_address(name)) if _is_ip(name) else x509.DNSName(name)


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
