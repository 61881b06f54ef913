"""Checks that one line names what is missing if links cannot be disturbed, and that other faults continue."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.tools.chaos import firewall, run
from llamaclust.tools.chaos.firewall import Firewall, FirewallError
from llamaclust.tools.chaos.run import ChaosSettings
from llamaclust.tools.chaos.schedule import FaultKind
from llamaclust.tools.chaos.targets import Permissions, Targets

LINKS = (FaultKind.PARTITION, FaultKind.SLOW_LINK)
ROOT = "filtering packets needs CAP_NET_ADMIN (root)"


class Shown:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, text: str) -> None: ...


def settings(*required: FaultKind) -> ChaosSettings:
    return ChaosSettings(
        state_dir=Path(),
        cluster=None,
        seed=1,
        duration_s=1.0,
        streams=1,
        permissions=Permissions(),
        required=frozenset(required),
        with_other_requests=False,
    )


def targets(*links: str) -> Targets:
    return Targets(dict.fromkeys(FaultKind, ()) | dict.fromkeys(LINKS, links))


def test_without_the_right_or_the_library_nothing_is_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "_may_filter", lambda: True)
    monkeypatch.setattr(firewall, "_LIBRARY", "libmissing.so.1")
    with pytest.raises(FirewallError, match=r"libmissing.so.1 is not installed \(Debian, Ubuntu: nftables\)"):
        Firewall()
    monkeypatch.setattr(firewall, "_may_filter", lambda: False)
    with pytest.raises(FirewallError, match="CAP_NET_ADMIN"):
        Firewall()


def test_faults_of_links_are_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "_may_filter", lambda: False)
    shown = Shown()
    with run._firewall(settings(FaultKind.KILL), targets("a"), shown) as found:
        assert found is None and shown.lines == [f"no partition, no slow-link: {ROOT}"]
    with (
        pytest.raises(UsageError, match="--faults partition: filtering packets needs"),
        run._firewall(settings(FaultKind.PARTITION), targets("a"), shown),
    ):
        pass
    assert not Permissions().without_links().kinds & set(LINKS)


def test_a_cluster_without_links_needs_no_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "_may_filter", pytest.fail)
    shown = Shown()
    with run._firewall(settings(), targets(), shown) as found:
        assert found is None and not shown.lines
