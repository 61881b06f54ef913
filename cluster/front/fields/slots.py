"""Fields that name slots, as llama.cpp's clients do."""

from __future__ import annotations

from llamaclust.cluster.front.schema import Body


class SlotFields(Body):
    """Which slot remembers the tokens of a request."""

    id_slot: int = -1
    """The slot that remembers the tokens, for `POST /slots`; below 0: none. Without `api.slot_folder` no slot does."""

    @property
    def slot(self) -> int | None:
        return None if self.id_slot < 0 else self.id_slot
