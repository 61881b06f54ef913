"""Decides which member caused a group's failure, from the reports of its members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llamaclust.wire.control.groups import GroupFault

# A member that closed its link may have done so because a third member failed.
_STRONGEST_FIRST = ("failed", "wrong", "late", "closed")


def judge(reports: Mapping[str, GroupFault]) -> GroupFault | None:
    """Returns the report that most likely names the member at fault, or None if there are no reports."""
    accusers = Counter((fault.kind, fault.worker) for name, fault in reports.items() if fault.worker != name)
    return min(
        reports.values(),
        key=lambda fault: (
            _STRONGEST_FIRST.index(fault.kind),
            -accusers[fault.kind, fault.worker],
            fault.worker in reports,
        ),
        default=None,
    )
