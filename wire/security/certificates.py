"""Makes and reads keys, certificate requests and certificates, with the `cryptography` library (ECDSA on P-256)."""

from __future__ import annotations

import hashlib
import time

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from llamaclust.core.errors import ProtocolError, UsageError
from llamaclust.wire.security.credentials import KeyPair


class NewKey:
    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    @property
    def request(self) -> bytes:
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.DER)

    def with_certificate(self, certificate: bytes) -> KeyPair:
        loaded = _certificate(certificate)
        if loaded.public_key() != self._key.public_key():
            raise ProtocolError("the certificate's key is not the key in the request")
        ends_at_s = loaded.not_valid_after_utc.timestamp()
        return KeyPair(private_pem(self._key), loaded.public_bytes(Encoding.PEM), time.time(), ends_at_s)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not an ECDSA key on P-256")
    return key


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """Returns the key in a certificate request (DER). Raises ProtocolError if that key did not sign the request."""
    try:
        loaded = x509.load_der_x509_csr(request)
        key = loaded.public_key()
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
            raise ProtocolError("the certificate request's key is not an ECDSA key on P-256")
        if not loaded.is_signature_valid:
            raise ProtocolError("the certificate request is not signed with its own key")
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ProtocolError("the certificate request is damaged and cannot be decoded") from error
    return key


def sign(pair: KeyPair, statement: bytes) -> bytes:
    return load_private(pair.private_key).sign(statement, ec.ECDSA(hashes.SHA256()))


def has_signed(host: str, certificate: bytes, statement: bytes, signature: bytes, ca: bytes) -> bool:
    """Returns True if the certificate's key signed `statement` and the CA issued the certificate for `host` only. Does
    not check whether the certificate has expired."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        loaded.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = loaded.public_key()
        if [*names] != [x509.DNSName(host)] or not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.InvalidVersion):
        return False
    return True


def pem(der: bytes) -> bytes:
    return _certificate(der).public_bytes(Encoding.PEM)


def ends_at_s(certificate_pem: bytes) -> float:
    """Returns a certificate's expiry time in seconds since 1970. Raises UsageError if the certificate is unreadable."""
    try:
        return x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise UsageError("a certificate cannot be read") from error


def ca_hash(ca: bytes) -> bytes:
    return hashlib.sha256(ca).digest()


def cluster_id(hashed: bytes) -> str:
    return hashed.hex()[:16]


def _certificate(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise ProtocolError("the certificate is damaged and cannot be decoded") from error
