"""Permits to measure links. A worker shows its permit, signed by the coordinator, to the worker at the other end."""

from __future__ import annotations

import binascii
import time
from base64 import b64decode, b64encode

from llamaclust.core.bounds import MAX_PERMIT
from llamaclust.core.errors import UsageError
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.credentials import Credentials, Identity


def permit(credentials: Credentials, caller: str, worker: str) -> str:
    """Returns a signed permit for `caller` to measure its link to `worker`, or "" if members have no certificates."""
    if not isinstance(credentials, Identity):
        return ""
    from llamaclust.wire.security.certificates import sign

    signature = sign(credentials.pair, _statement(credentials.cluster, Principal(caller), Principal(worker)))
    return f"{b64encode(credentials.pair.certificate).decode()}.{b64encode(signature).decode()}"


def is_permitted(credentials: Credentials, caller: Principal, shown: str) -> bool:
    """Returns True if `shown` permits `caller` to measure its link to this worker, or if no permit is needed."""
    if not isinstance(credentials, Identity):
        return True
    from llamaclust.wire.security.certificates import ends_at_s, has_signed

    try:
        certificate, signature = (b64decode(part, validate=True) for part in shown[:MAX_PERMIT].split("."))
        if ends_at_s(certificate) <= time.time():
            return False
    except (ValueError, binascii.Error, UsageError):
        return False
    statement = _statement(credentials.cluster, caller, credentials.principal)
    return has_signed(COORDINATOR.host(credentials.cluster), certificate, statement, signature, credentials.ca)


def _statement(cluster: str, caller: Principal, worker: Principal) -> bytes:
    return f"llamaclust 1: in cluster {cluster}, {caller} may measure its link to {worker}".encode()
