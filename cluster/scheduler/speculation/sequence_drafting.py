from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.mtp_use import MtpUse

_LATELY = 16  # Number of answer tokens after a forced token within which another forced token is likely.


@dataclass(slots=True)
class Drafting:
    has_mtp: bool = False  # True if the last stage has an MTP head.
    drafts: SequenceDrafts | None = None  # Drafts of tokens that may follow. None: nothing was drafted yet.
    mtp: MtpUse = field(default_factory=MtpUse)
    forced: tuple[int, ...] = ()  # Tokens that the grammar requires after the last token.
    next: tuple[int, ...] = ()  # Drafted tokens to compute together with the last token.
    ahead: tuple[int, ...] = ()  # Drafted tokens in flight, after the known tokens.
    branch: int = 0  # Number of times that drafted rows in flight were given up.
    rows: int = 0
    accepted: int = 0  # Number of drafted rows whose tokens were accepted.
    _forced_at: int = -_LATELY  # Number of answer tokens when the last forced token was added.

    def rate(self, confidence: int) -> float:
        """Returns the probability that a token of this confidence class is accepted, or 0.0 before any draft."""
        return 0.0 if self.drafts is None else self.drafts.rate(confidence)

    def take(self) -> tuple[int, ...]:
        taken, self.next = self.next, ()
        self.rows += len(taken)
        self.ahead += taken
        return taken

    def give_up(self) -> None:
        self.branch += 1
        self.ahead = ()

    def settle(self, added: list[int]) -> bool:
        """Removes the first len(added) drafted tokens in flight. Returns True if they equal `added`."""
        expected, self.ahead = self.ahead[: len(added)], self.ahead[len(added) :]
        return list(expected) == added[: len(expected)]

    def restart(self) -> None:
        self.next, self.mtp = (), MtpUse()
        self.give_up()

    def was_forced(self, generated: int) -> None:
        self._forced_at = generated

    def expects_forced(self, generated: int) -> bool:
        return generated - self._forced_at < _LATELY
