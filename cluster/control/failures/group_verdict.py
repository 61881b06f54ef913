"""Decides which member caused a group's failure, from the reports of its members, of which some may be false."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llamaclust.wire.control.groups import GroupFault

_STRONGEST_FIRST = ("failed", "wrong", "late", "closed")


def judge(reports: Mapping[str, GroupFault], size: int) -> GroupFault | None:
    """Returns a report about the member at fault, or None if the reports do not show who it is.

    `reports` are by sender. A member that reports itself is at fault. Otherwise it is the member that more than half
    of the others accuse, by whatever kind of report, so in a group of two the accusation of one member suffices if the
    other accuses nobody."""
    admissions = [fault for name, fault in reports.items() if fault.worker == name]
    if admissions:
        return _strongest(admissions)
    accused = Counter(fault.worker for name, fault in reports.items() if not _is_explained(name, fault, reports))
    for name, accusers in accused.items():
        # Another member may be accused as often only if half of the members send false reports.
        if 2 * accusers > size - 1 and [*accused.values()].count(accusers) == 1:
            return _strongest([fault for fault in reports.values() if fault.worker == name])
    return None


def dispute(reports: Mapping[str, GroupFault]) -> tuple[str, GroupFault] | None:
    """Returns the sender and the report of the strongest accusation, for reports that `judge` cannot decide."""
    accusations = sorted(reports.items(), key=lambda report: _is_explained(report[0], report[1], reports))
    return min(accusations, key=lambda report: _STRONGEST_FIRST.index(report[1].kind), default=None)


def _is_explained(name: str, fault: GroupFault, reports: Mapping[str, GroupFault]) -> bool:
    """Returns True if the accused has closed its links because it accuses another member than `name`, the accuser."""
    return fault.kind == "closed" and fault.worker in reports and reports[fault.worker].worker != name


def _strongest(faults: list[GroupFault]) -> GroupFault | None:
    return min(faults, key=lambda fault: _STRONGEST_FIRST.index(fault.kind), default=None)
