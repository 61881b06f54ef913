from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.core.errors import DeadlineError, UsageError
from llamaclust.core.limits import MAX_WORKERS, NUMERICS_VERSION
from llamaclust.core.version import VERSION
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.messages import Deadlines, Register
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials, check_address

HANDSHAKE_S = 10.0

RefusalReason = Callable[[str], str | None]
Certify = Callable[[bytes, Principal], bytes]


@dataclass(frozen=True, slots=True)
class JoinSettings:
    heartbeat_timeout_s: float
    deadlines: Deadlines = field(default_factory=Deadlines)
    cluster: str = ""  # Name of the cluster, for logs of workers.
    refusal: RefusalReason | None = None
    certify: Certify | None = None  # Renews certificates. None: the cluster has no certificates.
    record: ControlRecord = field(default_factory=ControlRecord)


class JoinRules:
    """Rules that the registration of a worker must meet."""

    def __init__(self, members: Members, settings: JoinSettings, credentials: Credentials) -> None:
        self._members = members
        self._settings = settings
        self._credentials = credentials

    async def refusal(self, register: Register, peer: Principal | None) -> str | None:
        """Returns the reason to refuse a worker, or None. If a member has the same name, first waits until
        that member sends a message or is lost. The name of a lost member is free."""
        if mismatch := self._mismatch(register, peer):
            return mismatch
        if duplicate := self._members.present.get(register.name):
            await self._probe(duplicate)
        if duplicate := self._members.present.get(register.name):
            pid = duplicate.registration.pid
            return f"a worker named {register.name} is a member already (pid {pid}): choose another name"
        if surplus := self._surplus():
            return surplus
        return self._settings.refusal(register.name) if self._settings.refusal else None

    def _mismatch(self, register: Register, peer: Principal | None) -> str | None:
        name = register.name
        if peer is not None and peer.worker != name:
            return f"the certificate of {peer} cannot register worker {name}"
        same = f"install the same version of llamaclust everywhere ({register.shown_version} there, {VERSION} here)"
        if register.protocol_version != PROTOCOL_VERSION:
            theirs = f"protocol {register.protocol_version}"
            return f"worker {name} speaks {theirs}, this coordinator {PROTOCOL_VERSION}: {same}"
        if register.numerics_version != (needed := self._numerics_version(register)):
            theirs = f"numerics_version {register.numerics_version}"
            return f"worker {name} computes by {theirs}, this cluster needs {needed}: {same}"
        try:
            check_address(register.address, self._credentials)
            if register.link_address:
                check_address(register.link_address, self._credentials)
        except UsageError as error:
            return f"worker {name} has no usable address: {error}"
        return None

    def _surplus(self) -> str | None:
        present = self._members.present
        return f"the cluster has {len(present)} workers, which is the limit" if len(present) >= MAX_WORKERS else None

    async def _probe(self, member: WorkerHandle) -> None:
        with contextlib.suppress(DeadlineError):
            async with deadline("a heartbeat", self._settings.heartbeat_timeout_s + HANDSHAKE_S):
                await member.is_responsive()

    def _numerics_version(self, register: Register) -> int:
        members = (handle.registration.numerics_version for handle in self._members.present.values())
        return next(members, 0 if register.device == "reference" else NUMERICS_VERSION)
