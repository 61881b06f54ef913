"""Mutual TLS for gRPC. Each side shows a certificate from the cluster's CA and checks the other side's name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from llamaclust.core.errors import UsageError
from llamaclust.wire.security.certificate_names import Principal, principal_of
from llamaclust.wire.security.credentials import Identity, KeyPair

TARGET_NAME = "grpc.ssl_target_name_override"


def channel_credentials(identity: Identity) -> Any:
    pair = identity.pair
    return grpc.ssl_channel_credentials(identity.ca, pair.private_key, pair.certificate)


def server_credentials(identity: Identity, on_handshake: Callable[[], None]) -> Any:
    """Returns credentials that use the newest certificate in each handshake. Any thread may call `on_handshake`."""
    shown = identity.pair

    def configuration(pair: KeyPair) -> Any:
        return grpc.ssl_server_certificate_configuration([(pair.private_key, pair.certificate)], identity.ca)

    def fetch() -> Any:
        nonlocal shown
        on_handshake()
        if identity.pair is shown:
            return None  # None keeps the previous certificate.
        shown = identity.pair
        return configuration(shown)

    return grpc.dynamic_ssl_server_credentials(configuration(shown), fetch, True)


def peer_principal(auth_context: Mapping[str, Iterable[bytes]], identity: Identity) -> Principal:
    """Returns the peer's identity. Raises UsageError if the peer's certificate has expired or names no member."""
    from llamaclust.wire.security.certificates import ends_at_s

    names = [name.decode("ascii", "replace") for name in auth_context.get("x509_subject_alternative_name", ())]
    principal = principal_of(names[0], identity.cluster) if len(names) == 1 else None
    if principal is None:
        raise UsageError("the certificate names no member of this cluster")
    (certificate,) = auth_context.get("x509_pem_cert", (b"",))
    # TLS does not check the expiry in resumed sessions.
    if ends_at_s(certificate) <= time.time():
        raise UsageError(f"the certificate of {principal} has expired")
    return principal
