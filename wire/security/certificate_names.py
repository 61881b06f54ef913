"""Host names in the certificates of processes: `coordinator.<cluster>.llamaclust` for the coordinator, and
`<name>.worker.<cluster>.llamaclust` for a worker."""

from __future__ import annotations

import re
from dataclasses import dataclass

_DOMAIN = "llamaclust"


@dataclass(frozen=True, slots=True)
class Principal:
    worker: str | None  # A worker's name, or None for the coordinator.

    def __str__(self) -> str:
        return "the coordinator" if self.worker is None else f"worker {self.worker}"

    def host(self, cluster: str) -> str:
        if self.worker is None:
            return f"coordinator.{cluster}.{_DOMAIN}"
        # Capital letters are escaped because host names are compared without regard to case.
        label = re.sub(r"[^a-z0-9.-]", lambda match: f"_{ord(match[0]):02x}", self.worker)
        return f"{label}.worker.{cluster}.{_DOMAIN}"


COORDINATOR = Principal(None)


def principal_of(host: str, cluster: str) -> Principal | None:
    if host == COORDINATOR.host(cluster):
        return COORDINATOR
    label = host.removesuffix(Principal("").host(cluster))
    if label == host:
        return None
    named = Principal(re.sub(r"_([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), label))
    return named if named.host(cluster) == host else None
