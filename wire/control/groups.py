"""Control messages about groups. The members of a group compute a stage together, each a part of every layer."""

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
    """Names the workers that compute a stage together. The first member, the leader, serves the stage's streams."""

    group_id: bytes  # Random bytes that only the members know.
    members: Annotated[tuple[GroupMember, ...], Size(2, MAX_GROUP_MEMBERS)]
    member: int  # Index of this worker in `members`.

    @property
    def shares(self) -> tuple[int, ...]:
        return tuple(member.share for member in self.members)

    def check(self) -> None:
        bounded("group_id", len(self.group_id), GROUP_ID_BYTES, GROUP_ID_BYTES)
        bounded("member", self.member, 0, len(self.members) - 1)
        names = [member.worker for member in self.members]
        if len({*names}) < len(names):
            raise ProtocolError(f"the group {', '.join(names)} contains a worker twice; members must differ")


_Seconds = Annotated[float, Real(0.0, 1e9)]


@dataclass(frozen=True, slots=True)
class GroupCounters:
    gathers: int = 0
    waited_s: _Seconds = 0.0  # Seconds that gathers spent waiting for the rows of other members.
    waited_for_s: Annotated[tuple[_Seconds, ...], Size(0, MAX_GROUP_MEMBERS)] = ()
    """Parts of `waited_s` by the index of the member that was waited for."""
    sent_bytes: int = 0  # Bytes sent to other members, including headers.
    received_bytes: int = 0
    one_row_steps: int = 0  # Number of microbatches with one row.
    one_row_waited_s: _Seconds = 0.0  # Part of `waited_s` that fell into microbatches with one row.


FAULTS = ("late", "closed", "wrong", "failed")


@dataclass(frozen=True, slots=True)
class GroupFault:
    """Reports that a group member ended an epoch because of a fault of its own or of another member."""

    epoch: Annotated[int, Integer(0, UINT64 - 1)]
    worker: WorkerName  # Name of the member at fault, as far as the sender knows.
    kind: Annotated[str, Choice(FAULTS)]
    reason: Reason
