"""Which portion of a stage an order to load asks for."""

from __future__ import annotations

from llamaclust.model.groups.portion import Portion
from llamaclust.wire.control.messages import Load


def portion_of(order: Load) -> Portion | None:
    """The portion of a group's member; None: the whole stage."""
    return None if order.group is None else Portion(order.group.shares, order.group.member)
