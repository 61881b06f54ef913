"""Credentials of a cluster's processes: a token on one machine, certificates between machines, or none. Host names in
certificates end with `<cluster>.llamaclust` and begin with `coordinator` or `<name>.worker`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from llamaclust.core.addresses import is_loopback, split_address
from llamaclust.core.errors import UsageError
from llamaclust.wire.security.token import ClusterToken

_DOMAIN = "llamaclust"


@dataclass(frozen=True, slots=True)
class Principal:
    worker: str | None  # a worker's name; None: the coordinator

    def __str__(self) -> str:
        return "the coordinator" if self.worker is None else f"worker {self.worker}"

    def host(self, cluster: str) -> str:
        if self.worker is None:
            return f"coordinator.{cluster}.{_DOMAIN}"
        # one name, one label, whatever becomes of capitals on the way: host names are compared without them
        label = re.sub(r"[^a-z0-9.-]", lambda match: f"_{ord(match[0]):02x}", self.worker)
        return f"{label}.worker.{cluster}.{_DOMAIN}"


COORDINATOR = Principal(None)


def principal_of(host: str, cluster: str) -> Principal | None:
    """Returns the identity for a certificate's host name, or None if the name is unknown or from another cluster."""
    if host == COORDINATOR.host(cluster):
        return COORDINATOR
    label = host.removesuffix(Principal("").host(cluster))
    if label == host:
        return None
    named = Principal(re.sub(r"_([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), label))
    return named if named.host(cluster) == host else None


MAX_SKEW_S = 300.0


@dataclass(frozen=True, slots=True)
class KeyPair:
    private_key: bytes = field(repr=False)
    certificate: bytes
    made_at_s: float  # seconds since 1970, as this machine counts them
    ends_at_s: float

    @property
    def life_s(self) -> float:
        return max(0.0, self.ends_at_s - self.made_at_s)

    @property
    def renewal_in_s(self) -> float:
        """Seconds until two thirds of a certificate's life are over, or 0 if the clock is before the life's start."""
        age_s = time.time() - self.made_at_s
        return 0.0 if age_s < -MAX_SKEW_S else max(0.0, self.life_s * 2 / 3 - age_s)


@dataclass(slots=True, eq=False)
class Identity:
    """The certificate that this process shows, and the CA that it accepts. Replacing `pair` breaks no connection."""

    ca: bytes  # its certificate, PEM
    cluster: str
    principal: Principal
    pair: KeyPair


@dataclass(frozen=True, slots=True)
class Insecure:
    """The user's choice of unprotected links, which anybody can read, change and open."""


Credentials = ClusterToken | Identity | Insecure


def check_address(address: str, credentials: Credentials) -> None:
    """Raises UsageError if the text is not an address, or if the credentials do not allow the address."""
    if isinstance(credentials, ClusterToken):
        check_private(address)
    else:
        split_address(address)


def check_private(address: str) -> None:
    """Raises UsageError unless the address is a Unix socket or loopback, because these links are not encrypted."""
    if not (address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))):
        what = "only unix:PATH and loopback HOST:PORT are possible here, because these links are not encrypted"
        raise UsageError(f"address {address!r}: {what}")
