"""Certificate files of the API's port, signed by an authority or self-signed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from llamaclust.cluster.front.http.certificate import CertificateFiles, ServerCertificate, keep_self_signed
from llamaclust.cluster.membership.authority import new_ca
from llamaclust.cluster.state.directory import write_private
from llamaclust.wire.security.certificates import private_pem

NAMES = ("localhost", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class SignedFiles:
    """The files that a certificate authority sends, and the authority's own certificate."""

    ca: Path
    files: CertificateFiles


@cache
def _authority() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    return new_ca()


def write_signed(
    folder: Path, names: tuple[str, ...] = NAMES, *, begin_days: float = -1, end_days: float = 30
) -> SignedFiles:
    """Writes signed files; replaces existing files one after the other, as renewal tools do."""
    ca_key, ca = _authority()
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begin_days))
        .not_valid_after(now + timedelta(days=end_days))
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    ca_file, chain, key_file = folder / "ca.crt", folder / "tls.crt", folder / "tls.key"
    ca_pem = ca.public_bytes(Encoding.PEM).decode()
    write_private(ca_file, ca_pem)
    write_private(chain, certificate.public_bytes(Encoding.PEM).decode() + ca_pem)
    write_private(key_file, private_pem(key).decode())
    return SignedFiles(ca_file, CertificateFiles(chain, key_file))


def self_signed(folder: Path, names: tuple[str, ...] = NAMES) -> ServerCertificate:
    """Creates a self-signed certificate, published as `api.crt` in the folder."""
    path = folder / "api.pem"
    keep_self_signed(path, names)
    certificate = ServerCertificate(CertificateFiles(path, path))
    certificate.publish(folder / "api.crt")
    return certificate


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
