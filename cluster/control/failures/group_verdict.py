"""Decides from the reports of a group's members which worker made the group fail. Each member reports once. A closed
link is weak evidence: the member that closed it may have found another one at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llamaclust.wire.control.groups import GroupFault

_STRONGEST_FIRST = ("failed", "wrong", "late", "closed")


def judge(reports: Mapping[str, GroupFault]) -> GroupFault | None:
    """Returns the report of the strongest kind with the most accusers, preferably against a worker without a report."""
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
