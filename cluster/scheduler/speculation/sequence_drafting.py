"""One sequence's drafted tokens: those to compute with its last token, those in flight, and their counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.mtp_use import MtpUse

_LATELY = 16  # tokens of an answer after a forced one, in which a further one is likely


@dataclass(slots=True)
class Drafting:
    has_mtp: bool = False  # the last stage has an MTP head
    drafts: SequenceDrafts | None = None  # what may follow the sequence's tokens
    mtp: MtpUse = field(default_factory=MtpUse)
    forced: tuple[int, ...] = ()  # tokens that must follow the last one, by the answer's grammar
    next: tuple[int, ...] = ()  # tokens to compute with the last one
    ahead: tuple[int, ...] = ()  # tokens under way, behind the known ones
    branch: int = 0  # how many times rows under way were given up
    rows: int = 0  # drafted rows, in all
    accepted: int = 0  # drafted rows whose tokens were chosen
    _forced_at: int = -_LATELY  # tokens of the answer with the last forced one

    def take(self) -> tuple[int, ...]:
        taken, self.next = self.next, ()
        self.rows += len(taken)
        self.ahead += taken
        return taken

    def give_up(self) -> None:
        self.branch += 1
        self.ahead = ()

    def settle(self, added: list[int]) -> bool:
        """Processes a window's added tokens. Returns True if they are as drafted: later windows then stay valid."""
        expected, self.ahead = self.ahead[: len(added)], self.ahead[len(added) :]
        return list(expected) == added[: len(expected)]

    def restart(self) -> None:
        self.next, self.mtp = (), MtpUse()
        self.give_up()

    def was_forced(self, generated: int) -> None:
        self._forced_at = generated

    def expects_forced(self, generated: int) -> bool:
        return generated - self._forced_at < _LATELY
