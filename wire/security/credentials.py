"""Credentials of a cluster's processes: a token on one machine, certificates between machines, or none."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llamaclust.core.addresses import is_loopback, split_address
from llamaclust.core.errors import UsageError
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.token import ClusterToken

MAX_SKEW_S = 300.0


@dataclass(frozen=True, slots=True)
class KeyPair:
    private_key: bytes = field(repr=False)
    certificate: bytes
    made_at_s: float  # Time when the pair was made, in seconds since 1970 by this machine's clock.
    ends_at_s: float

    @property
    def life_s(self) -> float:
        return max(0.0, self.ends_at_s - self.made_at_s)

    @property
    def renewal_in_s(self) -> float:
        """Seconds until two thirds of the certificate's lifetime are over, or 0 if `made_at_s` is in the future."""
        age_s = time.time() - self.made_at_s
        return 0.0 if age_s < -MAX_SKEW_S else max(0.0, self.life_s * 2 / 3 - age_s)


@dataclass(slots=True, eq=False)
class Identity:
    """This process's certificate, and the CA that it trusts. Replacing `pair` does not end open connections."""

    ca: bytes  # The CA's certificate, PEM.
    cluster: str
    principal: Principal
    pair: KeyPair


@dataclass(frozen=True, slots=True)
class Insecure:
    """Credentials for unprotected links, which the user allowed. Anybody can open them and read or change the data."""


Credentials = ClusterToken | Identity | Insecure


def check_address(address: str, credentials: Credentials) -> None:
    """Raises UsageError if the text is not an address, or if the credentials do not allow the address."""
    if isinstance(credentials, ClusterToken):
        check_private(address)
    else:
        split_address(address)


def check_private(address: str) -> None:
    """Raises UsageError unless the address is a Unix socket or loopback, because other links would need encryption."""
    if not (address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))):
        what = "must be unix:PATH or a loopback HOST:PORT, because connections to it are not encrypted"
        raise UsageError(f"address {address!r} {what}")
