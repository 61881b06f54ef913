"""Fields that name slots, as llama.cpp's clients do."""

from __future__ import annotations

from pydantic import Field

from llamaclust.cluster.api.schema import Body


class SlotFields(Body):
    """Which slot remembers the tokens of a request."""

    id_slot: int = -1
    """The slot that remembers the tokens, for `POST /slots`; below 0: none. Without `api.slot_folder` no slot does."""

    @property
    def slot(self) -> int | None:
        return None if self.id_slot < 0 else self.id_slot


class SlotBody(Body):
    """`POST /slots/ID?action=save` and `restore`; `erase` has no body."""

    filename: str = Field(min_length=1, max_length=128)
    """A name in the folder `api.slot_folder` of the cluster file."""
    model: str | None = None
    """Of several models, the one whose slot it is."""
