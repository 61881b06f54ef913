"""Proofs that a coordinator's term is genuine. A term is the number of a coordinator's run, and grows with each run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import Size
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.credentials import Credentials, Identity


@dataclass(frozen=True, slots=True)
class TermProof:
    """A coordinator's signature of its term. Both fields are empty if members have no certificates."""

    certificate: Annotated[bytes, Size(0, 4096)] = b""  # PEM
    signature: Annotated[bytes, Size(0, 128)] = b""


def prove_term(credentials: Credentials, term: int, name: str) -> TermProof:
    """Signs the coordinator's term together with the cluster's name, because several clusters may share a CA."""
    if not isinstance(credentials, Identity):
        return TermProof()
    from llamaclust.wire.security.certificates import sign

    return TermProof(credentials.pair.certificate, sign(credentials.pair, _statement(credentials.cluster, term, name)))


def is_term_proven(credentials: Credentials, term: int, proof: TermProof, name: str) -> bool:
    """Returns True if a coordinator of this cluster signed the term, or if members have no certificates."""
    if not isinstance(credentials, Identity):
        return True
    from llamaclust.wire.security.certificates import has_signed

    host, statement = COORDINATOR.host(credentials.cluster), _statement(credentials.cluster, term, name)
    return has_signed(host, proof.certificate, statement, proof.signature, credentials.ca)


def _statement(cluster: str, term: int, name: str) -> bytes:
    return f"llamaclust 1: a coordinator of cluster {cluster} {name} has term {term}".encode()
