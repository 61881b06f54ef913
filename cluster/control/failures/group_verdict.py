"""Decides which member caused a group's failure. Each member reports one fault. A report that another member closed its
link is weak evidence, because that member may have closed the link after a third member failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llamaclust.wire.control.groups import GroupFault

_STRONGEST_FIRST = ("failed", "wrong", "late", "closed")


def judge(reports: Mapping[str, GroupFault]) -> GroupFault | None:
    """Returns the report of the strongest kind. Among such reports, prefers a report against the worker that most other
    members accuse. If several are left, prefers a report against a worker that has sent no report."""
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
