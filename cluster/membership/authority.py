"""The certificate authority (CA) of a cluster. It is created at the first start, and kept in the state directory. Its
certificates are valid for one day."""

from __future__ import annotations

import asyncio
import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llamaclust.cluster.state.directory import write_private
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.cluster.state.file_lock import folder_locked
from llamaclust.core.errors import DeadlineError, LlamaclustError, UsageError
from llamaclust.core.regular_file import read_bytes, sync_folder
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.certificates import NewKey, ca_hash, cluster_id, load_private, private_pem, requested_key
from llamaclust.wire.security.credentials import MAX_SKEW_S, Identity, KeyPair
from llamaclust.wire.security.token import JoinToken

LIFE = timedelta(hours=24)
"""Validity of certificates of workers and the coordinator. They are renewed after two thirds of this time."""
_MOST_BYTES = 1 << 20
_LOCK_WAIT_S = 10.0
_READ_S = 3.0
_CA_LIFE = timedelta(days=3650)
_SKEW = timedelta(seconds=MAX_SKEW_S)
_CA_BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
"""Start of a CA's validity. It is long ago, in case the clock of a machine is wrong."""

_log = logging.getLogger(__name__)

_SHARED = ".trust"
_CA_KEY, _CA_CERTIFICATE, _TOKEN = "ca.key", "ca.crt", "token"
_BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def trust_folder(cluster: Path) -> Path:
    """Returns the folder of a static cluster's authority: `trust` in the cluster's folder if it exists, or else a
    folder that all clusters in the state directory share."""
    own = cluster / "trust"
    return own if own.exists() else cluster.parent / _SHARED


class Authority:
    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.token_file = folder / _TOKEN
        self._token = self._read_token()
        self._disk, self._reading = DiskThread("join token"), asyncio.Lock()

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Opens the authority in `folder`, or creates it. Raises UsageError if the folder is damaged or readable by
        other users, and LlamaclustError if it cannot be written."""
        try:
            if not folder.exists():
                _create(folder)
        except OSError as error:
            what = f"{folder}: cannot be written: {error.strerror}"
            raise LlamaclustError(f"{what}; free disk space, or set `join.trust_dir` to another folder") from error
        try:
            if folder.stat().st_mode & 0o077 or (folder / _CA_KEY).stat().st_mode & 0o077:
                raise UsageError(f"{folder}: other users can read it; run: chmod -R go= {folder}")
            key = load_private(read_bytes(folder / _CA_KEY, _MOST_BYTES))
            certificate = x509.load_pem_x509_certificate(read_bytes(folder / _CA_CERTIFICATE, _MOST_BYTES))
        except (OSError, ValueError) as error:
            what = f"{folder}: the folder cannot be read: {error}"
            raise UsageError(f"{what}; remove the folder to get new certificates and a new token") from error
        if certificate.public_key() != key.public_key():
            raise UsageError(f"{folder}: key and certificate do not match; remove the folder to get new ones")
        _check_time(folder, certificate)
        return cls(folder, key, certificate)

    def _read_token(self) -> JoinToken:
        token = JoinToken.read(self.token_file)
        if token.ca_hash != ca_hash(self.certificate):
            certificate = self.token_file.parent / _CA_CERTIFICATE
            raise UsageError(f"token file {self.token_file}: the token is not from the CA of {certificate}")
        return token

    @property
    def token(self) -> JoinToken:
        """The last valid token that was read from the file."""
        return self._token

    async def current_token(self) -> JoinToken:
        """Returns the token in the file, or the last valid token if the file cannot be read within 3 s."""
        async with self._reading:
            try:
                async with deadline(f"reading {self.token_file}", _READ_S):
                    self._token = await self._disk.call(self._read_token)
            except (UsageError, DeadlineError, TimeoutError) as error:
                _log.warning("the join token stays as it was: %s", error)
        return self._token

    def rotate_token(self) -> None:
        """Replaces the token. Workers can no longer enrol with the old token, but present members stay."""
        write_private(self.token_file, JoinToken.create(self._token.ca_hash).text + "\n")

    @property
    def certificate(self) -> bytes:
        return self._certificate.public_bytes(Encoding.DER)

    @property
    def cluster(self) -> str:
        return cluster_id(self._token.ca_hash)

    def identity(self, principal: Principal = COORDINATOR, life: timedelta = LIFE) -> Identity:
        """Creates an identity with a new key, which is never written to disk."""
        ca = self._certificate.public_bytes(Encoding.PEM)
        return Identity(ca, self.cluster, principal, self.new_pair(principal, life))

    def new_pair(self, principal: Principal, life: timedelta = LIFE) -> KeyPair:
        key = NewKey()
        return key.with_certificate(self.certify(key.request, principal, life))

    def certify(self, request: bytes, principal: Principal, life: timedelta = LIFE) -> bytes:
        """Returns a signed certificate (DER) for a certificate request (DER). Raises ProtocolError if the request is
        invalid."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._certificate.subject)
            .public_key(requested_key(request))
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + life)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(principal.host(self.cluster))]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_BOTH), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.DER)

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        try:
            named = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(named)


def new_ca(life: timedelta = _CA_LIFE) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llamaclust cluster CA")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_CA_BEGIN)
        .not_valid_after(max(datetime.now(UTC), _CA_BEGIN) + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, builder.sign(key, hashes.SHA256())


def _check_time(folder: Path, certificate: x509.Certificate) -> None:
    begin, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if not begin <= now <= end:
        valid = f"its certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
        clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
        raise UsageError(
            f"{folder}: {valid}, {clock}; set the clock, or remove the folder to get a new certificate and token"
        )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs,
        key_cert_sign=not signs,
        crl_sign=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _create(folder: Path) -> None:
    """Creates the folder atomically, so that interrupted and concurrent starts never leave an incomplete folder."""
    key, certificate = new_ca()
    token = JoinToken.create(ca_hash(certificate.public_bytes(Encoding.DER)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_locked(folder.parent, _LOCK_WAIT_S):
        if folder.exists():
            return
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        write_private(new / _CA_KEY, private_pem(key).decode())
        write_private(new / _CA_CERTIFICATE, certificate.public_bytes(Encoding.PEM).decode())
        write_private(new / _TOKEN, token.text + "\n")
        new.rename(folder)
        sync_folder(folder.parent)
