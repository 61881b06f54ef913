"""Admissions on their way into the journal."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field

from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.state.adapters import ServedAdapters
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Admission, Instant


@dataclass(frozen=True, slots=True)
class Durability:
    """Where admissions are written, and what they need to be valid for a later coordinator."""

    journal: Journal
    served: str  # digest of the model and its settings
    request_s: float
    adapters: ServedAdapters = field(default_factory=ServedAdapters)

    def admit(
        self, ticket: Ticket, endpoint: str, body: bytes, *, is_streamed: bool, is_background: bool
    ) -> Awaitable[None]:
        """See `Journal.admit`."""
        admission = Admission(
            identity=ticket.identity,
            endpoint=endpoint,
            body=body,
            admitted=Instant.now(),
            limit_s=self.request_s,
            served=self.served,
            is_streamed=is_streamed,
            is_background=is_background,
            has_grammar=bool(ticket.constraint.is_used),
            earlier=ticket.earlier.messages,
            adapters=self.adapters.marks(ticket.adapters),
        )
        return self.journal.admit(admission)
