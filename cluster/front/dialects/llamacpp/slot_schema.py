"""Bodies of requests for slots."""

from __future__ import annotations

from pydantic import Field

from llamaclust.cluster.front.schema import Body


class SlotBody(Body):
    """`POST /slots/ID?action=save` and `restore`; `erase` has no body."""

    filename: str = Field(min_length=1, max_length=128)
    """A name in the folder `api.slot_folder` of the cluster file."""
    model: str | None = None
    """Of several models, the one whose slot it is."""
