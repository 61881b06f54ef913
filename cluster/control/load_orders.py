"""Makes the `Load` messages, which tell workers what stages to load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from secrets import token_bytes

from llamaclust.cluster.control.remote.model_copies import OwnCopy
from llamaclust.cluster.control.weight_sources import ModelReference, WantedBytes
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import PROGRESS_TIMEOUT_S, WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.core.errors import WorkerError
from llamaclust.core.limits import GROUP_ID_BYTES, StageLimits
from llamaclust.wire.control.groups import GroupMember, GroupOrder
from llamaclust.wire.control.messages import Load
from llamaclust.wire.control.weights import AdapterFile, EncoderFile, WeightSources


@dataclass(frozen=True, slots=True)
class StageLoads:
    """The stages to load for a plan. If `is_exclusive` is set, workers first free the model's other stages."""

    epoch: int
    stages: Sequence[StageInfo]
    model: ModelReference
    limits: StageLimits
    is_exclusive: bool = False
    links: Links = UNKNOWN
    progress_timeout_s: float = PROGRESS_TIMEOUT_S
    own: OwnCopy | None = None  # The coordinator's own copy of the model file.
    adapters: Mapping[int, WantedBytes] = field(default_factory=dict)
    # The projector, for stages with `encoder_bytes`. None if the model has no projector.
    encoder: WantedBytes | None = None

    @property
    def encoding(self) -> list[str]:
        return [stage.worker for stage in self.stages if stage.encoder_bytes]


def load_orders(
    loads: StageLoads,
    handles: Sequence[WorkerHandle],
    weights: Mapping[str, WeightSources],
    adapters: Mapping[str, tuple[AdapterFile, ...]],
    encoders: Mapping[str, EncoderFile],
) -> list[Load]:
    """Returns a `Load` message for each worker. Raises WorkerError if a group member accepts no connections."""
    groups = _group_orders(loads.stages, handles)
    return [
        replace(
            _load_order(loads, handles, index, group),
            weights=weights.get(handle.name),
            adapters=adapters.get(handle.name, ()),
            encoder=encoders.get(handle.name),
        )
        for index, (handle, group) in enumerate(zip(handles, groups, strict=True))
    ]


def _load_order(loads: StageLoads, handles: Sequence[WorkerHandle], index: int, group: GroupOrder | None) -> Load:
    stage, chain = loads.stages[index], leaders(handles, loads.stages)
    place = len(leaders(handles[: index + 1], loads.stages[: index + 1])) - 1
    leads, is_first, is_last = stage.member == 0, place == 0, place + 1 == len(chain)
    following = chain[place + 1] if leads and not is_last else None
    first = chain[0] if leads and is_last and not is_first else None
    return Load(
        loads.epoch,
        loads.model.path,
        loads.model.model_id,
        stage.start,
        stage.end,
        loads.limits,
        next_address=following.registration.address if following else None,
        next_worker=following.name if following else None,
        first_address=first.registration.address if first else None,
        first_worker=first.name if first else None,
        previous_worker=chain[place - 1].name if leads and not is_first else None,
        last_worker=chain[-1].name if leads and is_first and not is_last else None,
        exclusive=loads.is_exclusive,
        devices=stage.devices,
        group=group,
    )


def leaders(handles: Sequence[WorkerHandle], stages: Sequence[StageInfo]) -> list[WorkerHandle]:
    return [handle for handle, stage in zip(handles, stages, strict=True) if stage.member == 0]


def _group_orders(stages: Sequence[StageInfo], handles: Sequence[WorkerHandle]) -> Iterator[GroupOrder | None]:
    for begin, stage in enumerate(stages):
        if not stage.shares:
            yield None
        elif stage.member == 0:
            group_id, shares = token_bytes(GROUP_ID_BYTES), stage.shares
            members = tuple(map(_group_member, handles[begin : begin + len(shares)], shares))
            yield from (GroupOrder(group_id, members, place) for place in range(len(members)))


def _group_member(handle: WorkerHandle, share: int) -> GroupMember:
    if not handle.registration.link_address:
        text = f"worker {handle.name} cannot be in a group: it accepts no links from other members"
        raise WorkerError(f"{text}; look at its log, or give it layers of its own in the plan", worker=handle.name)
    return GroupMember(handle.name, handle.registration.link_address, share)
