from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.scheduler.drafting.drafter import Drafters
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.speculation.draft_model import DraftModel


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    drafters: Drafters
    max_window: int = MAX_WINDOW  # drafted tokens of one sequence in a microbatch, at most
    draft_model: DraftModel | None = None  # it drafts where that gains more than the drafters' drafts
    mtp: bool = False  # the last stage has an MTP head, and drafts with it
