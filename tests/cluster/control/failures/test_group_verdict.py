"""Tests which member of a group is at fault, for any reports in any order, and that false reports harm nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from random import Random

import pytest

from llamaclust.cluster.control.failures import failure_attribution
from llamaclust.cluster.control.failures.failure_attribution import attribute_failure
from llamaclust.cluster.control.failures.group_verdict import dispute, judge
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DisputeError, LlamaclustError, ProtocolError, WorkerError
from llamaclust.core.limits import GROUP_ID_BYTES, MAX_GROUP_MEMBERS
from llamaclust.wire.control.groups import GroupFault, GroupMember, GroupOrder
from llamaclust.wire.control.messages import CoordinatorMessage, Heartbeat, Loaded, PeerUnreachable, WorkerMessage
from llamaclust.wire.security.credentials import Insecure
from support.seed import SEED
from support.wire.control_messages import LOAD, REGISTER

LIARS = 200


def fault(worker: str, kind: str) -> GroupFault:
    return GroupFault(3, worker, kind, f"{worker} {kind}")


def of(text: str) -> dict[str, GroupFault]:
    """Reads reports such as "a: b late; c: b closed"."""
    reports = (report.partition(": ")[::2] for report in text.split("; "))
    return {name: fault(*said.split()) for name, said in reports}


@pytest.mark.parametrize(
    ("text", "size", "guilty"),
    [
        ("b: b failed; a: b closed; c: a closed", 3, "b"),
        ("c: c wrong; a: c wrong; b: a closed", 3, "c"),
        ("a: b late; c: b late", 3, "b"),
        ("a: b wrong; b: a wrong; c: a wrong", 3, "a"),
        ("b: c wrong; c: b wrong; a: b wrong; d: b late", 4, "b"),
        ("a: c late; b: c late; c: b late", 3, "c"),
        ("a: d late; b: d wrong; c: d closed", 4, "d"),
        ("b: a wrong; a: b late; c: b wrong", 3, "b"),
        ("b: a wrong; c: b late; d: b wrong; e: b closed; a: b late", 5, "b"),
        ("c: b closed; d: b closed; e: b late; f: c closed", 6, "b"),
        ("a: b closed", 2, "b"),
        ("b: a wrong", 2, "a"),
        ("b: b failed; a: b late", 2, "b"),
        ("b: b wrong; a: a failed", 2, "a"),
    ],
)
def test_the_member_at_fault(text: str, size: int, guilty: str) -> None:
    for order in permutations(of(text).items()):
        verdict = judge(dict(order), size)
        assert verdict is not None and verdict.worker == guilty


@pytest.mark.parametrize(
    ("text", "size", "pair"),
    [
        ("b: a wrong", 3, "ba"),
        ("b: a wrong; a: b closed; c: b closed", 3, "ba"),
        ("a: c wrong; b: a closed; c: a closed", 3, "ac"),
        ("b: a late; c: a wrong", 5, "ca"),
        ("a: b wrong; b: a wrong; c: b wrong; d: a wrong", 4, "ab"),
        ("e: f closed; f: e late", 7, "fe"),
        ("a: b late; b: a wrong", 2, "ab"),
        ("a: b closed; b: a wrong", 2, "ab"),
        ("a: b closed; b: a closed", 2, "ab"),
    ],
)
def test_reports_that_show_a_dispute_alone(text: str, size: int, pair: str) -> None:
    assert judge(of(text), size) is None
    disputed = dispute(of(text))
    assert disputed is not None and {disputed[0], disputed[1].worker} == {*pair}


@pytest.mark.parametrize("number", range(20))
async def test_two_members_that_accuse_each_other_are_never_quarantined(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 0.0)
    monkeypatch.setattr(failure_attribution, "_REPORTS_S", 0.0)
    print(f"seed {SEED}")
    drawn = Random(f"{SEED} {number}")
    lies = Lies(drawn, 2)
    for name in drawn.sample("ab", 2):
        lies.say(name, "ab".replace(name, ""), drawn.choice(("wrong", "late", "closed")))
    handles = members(lies)
    for name, message in lies.messages:
        handles[name].receive(message)
    error = await attribute_failure(3, [*handles.values()], None)
    assert isinstance(error, DisputeError) and error.worker is None and error.pair == {*"ab"}
    assert str(error).startswith("workers a and b of a group accuse each other: ")


def test_nobody_without_reports() -> None:
    assert judge({}, 3) is None and judge({}, 2) is None and dispute({}) is None


@dataclass
class Lies:
    """Messages and a stream's error of a group with liars; the other members report what they would see."""

    drawn: Random
    size: int
    liars: list[str] = field(default_factory=list)
    messages: list[tuple[str, WorkerMessage]] = field(default_factory=list)
    ended: LlamaclustError | None = None

    @property
    def names(self) -> str:
        return "abcdefgh"[: self.size]

    @property
    def honest(self) -> list[str]:
        return [name for name in self.names if name not in self.liars]

    def liar(self, *, leads: bool | None = None) -> str:
        choices = self.names if leads is None else self.names[:1] if leads else self.names[1:]
        self.liars.append(self.drawn.choice(choices))
        return self.liars[-1]

    def victim(self, *, leads: bool = False) -> str:
        return self.honest[0] if leads else self.drawn.choice(self.honest)

    def say(self, name: str, worker: str, kind: str) -> None:
        self.messages.append((name, fault(worker, kind)))

    def cascade(self, first: str, seen: str = "closed", culprit: str = "") -> None:
        """The honest members notice that links end: those of `culprit` or of a member that has already given up."""
        culprit, ended = culprit or self.liars[0], [first]
        if first in self.honest:
            self.say(first, culprit, seen)
        others = [name for name in self.honest if name != first]
        for name in self.drawn.sample(others, len(others)):
            self.say(name, self.drawn.choice(ended), "closed")
            ended.append(name)


def accuses_the_leader(lies: Lies) -> None:
    lies.say(lies.liar(leads=False), "a", "wrong")


def accuses_another(lies: Lies) -> None:
    liar = lies.liar()
    lies.say(liar, lies.victim(), lies.drawn.choice(("wrong", "late", "closed")))


def closes_its_links_in_silence(lies: Lies) -> None:
    lies.cascade(lies.liar())


def accuses_after_the_others(lies: Lies) -> None:
    liar = lies.liar()
    lies.cascade(liar)
    lies.say(liar, lies.victim(), "wrong")


def gives_two_reports(lies: Lies) -> None:
    liar = lies.liar()
    lies.say(liar, lies.victim(leads=True), "late")
    lies.cascade(liar)
    lies.say(liar, lies.victim(), "wrong")


def accuses_itself(lies: Lies) -> None:
    liar = lies.liar()
    lies.say(liar, liar, lies.drawn.choice(("failed", "wrong", "late")))
    lies.cascade(liar)


def damages_the_gathers_of_one_member(lies: Lies) -> None:
    """The damaged rows reach only one member, which ends its links before the others do."""
    liar = lies.liar()
    victim = lies.victim()
    lies.cascade(victim, "wrong")
    lies.say(liar, victim, lies.drawn.choice(("closed", "wrong")))


def calls_the_gathers_of_others_damaged(lies: Lies) -> None:
    liar = lies.liar()
    lies.say(liar, lies.victim(), "wrong")
    lies.cascade(liar)


def claims_timeouts(lies: Lies) -> None:
    liar = lies.liar()
    lies.say(liar, lies.victim(), "late")
    if lies.drawn.random() < 0.5:
        lies.cascade(liar)


def leads_and_blames_a_member_by_its_stream(lies: Lies) -> None:
    lies.liar(leads=True)
    lies.ended = WorkerError("a worker is at fault", worker=lies.victim())
    if lies.drawn.random() < 0.5:
        lies.cascade("a")


def leads_and_calls_a_member_unreachable(lies: Lies) -> None:
    lies.liar(leads=True)
    lies.messages.append(("a", PeerUnreachable(3, lies.victim(), "no answer")))
    lies.cascade("a")


def two_accuse_together(lies: Lies) -> None:
    """A group of five or more; the honest members are more than half."""
    lies.size = max(lies.size, 5)
    lies.liars += lies.drawn.sample(lies.names, 2)
    victim = lies.victim()
    for liar in lies.liars:
        lies.say(liar, victim, lies.drawn.choice(("wrong", "late")))
    if lies.drawn.random() < 0.5:
        lies.cascade(lies.liars[0])


KINDS: tuple[Callable[[Lies], None], ...] = (
    accuses_the_leader,
    accuses_another,
    closes_its_links_in_silence,
    accuses_after_the_others,
    gives_two_reports,
    accuses_itself,
    damages_the_gathers_of_one_member,
    calls_the_gathers_of_others_damaged,
    claims_timeouts,
    leads_and_blames_a_member_by_its_stream,
    leads_and_calls_a_member_unreachable,
    two_accuse_together,
)


def drawn_lies() -> Iterator[tuple[str, Lies]]:
    print(f"seed {SEED}")
    for number in range(LIARS):
        drawn = Random(f"{SEED} {number}")
        kind = KINDS[number % len(KINDS)]
        lies = Lies(drawn, drawn.randint(3, MAX_GROUP_MEMBERS))
        kind(lies)
        yield f"{number} {kind.__name__} {lies}", lies


def test_an_honest_member_is_never_at_fault_in_any_order() -> None:
    for what, lies in drawn_lies():
        reports: dict[str, GroupFault] = {}
        messages = lies.drawn.sample(lies.messages, len(lies.messages))
        for name, message in messages:
            if isinstance(message, GroupFault):
                reports.setdefault(name, message)
        verdict = judge(reports, lies.size)
        assert verdict is None or verdict.worker in lies.liars, what
        disputed = dispute(reports)
        assert disputed is None or verdict or {disputed[0], disputed[1].worker} & {*lies.liars}, what


async def _nothing(message: CoordinatorMessage) -> None: ...


def members(lies: Lies) -> Mapping[str, WorkerHandle]:
    group = tuple(GroupMember(name, f"unix:/{name}.l") for name in lies.names)
    handles = {
        name: WorkerHandle(replace(REGISTER, name=name), _nothing, lambda: "", Insecure()) for name in lies.names
    }
    for place, handle in enumerate(handles.values()):
        handle.stages[3] = replace(LOAD, group=GroupOrder(bytes(GROUP_ID_BYTES), group, place)), Loaded(3, 1, 1, 1)
    return handles


async def test_an_error_never_names_an_honest_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of messages pass the coordinator's checks. Disputes name a liar and one other worker."""
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 0.0)
    monkeypatch.setattr(failure_attribution, "_REPORTS_S", 0.0)
    outcomes: dict[str, set[str]] = {}
    for what, lies in drawn_lies():
        handles = members(lies)
        for handle in handles.values():
            handle.receive(Heartbeat(0.0, 0, 0, 0, 0))
        for name, message in lies.messages:
            handles[name].receive(message)
        error = await attribute_failure(3, [*handles.values()], lies.ended)
        assert error.worker is None or error.worker in lies.liars, what
        if isinstance(error, DisputeError):
            assert len(error.pair) == 2 and error.pair & {*lies.liars}, what
        result = "liar" if error.worker else "dispute" if isinstance(error, DisputeError) else "nobody"
        outcomes.setdefault(what.split()[1], set()).add(result)
    assert outcomes["accuses_itself"] == {"liar"}
    assert outcomes["accuses_the_leader"] == {"dispute"}
    assert "liar" not in outcomes["leads_and_calls_a_member_unreachable"]


async def test_a_report_of_another_member_s_own_failure_is_a_broken_protocol() -> None:
    lies = Lies(Random(SEED), 3)
    with pytest.raises(ProtocolError, match="must not report worker a as failed"):
        members(lies)["b"].receive(fault("a", "failed"))
