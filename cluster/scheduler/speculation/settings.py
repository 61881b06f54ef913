from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.scheduler.drafting.drafter import Drafters
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.speculation.draft_model import DraftModel


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    drafters: Drafters
    max_window: int = MAX_WINDOW
    draft_model: DraftModel | None = None  # Draft model, used where it gains more than the drafters.
    mtp: bool = False  # True if the last stage drafts with an MTP head.
