"""Control messages to and from groups, whose members each compute a part of every layer: orders and fault reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import UINT64, Address, Choice, Integer, Real, Reason, Size, WorkerName, bounded
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import GROUP_ID_BYTES, MAX_GROUP_MEMBERS, MAX_SHARE


@dataclass(frozen=True, slots=True)
class GroupMember:
    worker: WorkerName
    address: Address
    share: Annotated[int, Integer(1, MAX_SHARE)] = 1


@dataclass(frozen=True, slots=True)
class GroupOrder:
    """The workers that compute a stage together. The first member leads the group and has the stage's streams."""

    group_id: bytes  # random, known to the members alone
    members: Annotated[tuple[GroupMember, ...], Size(2, MAX_GROUP_MEMBERS)]
    member: int  # which of them this worker is

    @property
    def shares(self) -> tuple[int, ...]:
        return tuple(member.share for member in self.members)

    def check(self) -> None:
        bounded("group_id", len(self.group_id), GROUP_ID_BYTES, GROUP_ID_BYTES)
        bounded("member", self.member, 0, len(self.members) - 1)
        names = [member.worker for member in self.members]
        if len({*names}) < len(names):
            raise ProtocolError(f"the group {', '.join(names)} contains a worker twice")


_Seconds = Annotated[float, Real(0.0, 1e9)]


@dataclass(frozen=True, slots=True)
class GroupCounters:
    gathers: int = 0
    waited_s: _Seconds = 0.0  # that gathers have waited for the rows of others
    waited_for_s: Annotated[tuple[_Seconds, ...], Size(0, MAX_GROUP_MEMBERS)] = ()
    """`waited_s` divided among the members. Each wait counts for the member that was ready last."""
    sent_bytes: int = 0  # between the members, with headers
    received_bytes: int = 0
    one_row_steps: int = 0  # microbatches of one row
    one_row_waited_s: _Seconds = 0.0  # of the waits, those of these


FAULTS = ("late", "closed", "wrong", "failed")


@dataclass(frozen=True, slots=True)
class GroupFault:
    """Reports that a member has ended an epoch because it failed or because another member is at fault."""

    epoch: Annotated[int, Integer(0, UINT64 - 1)]
    worker: WorkerName  # at fault, as far as the member knows
    kind: Annotated[str, Choice(FAULTS)]
    reason: Reason
