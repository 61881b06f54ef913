"""Makes plans from the state of a cluster, both for running clusters and for `llamaclust plan`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import (
    capacity_of,
    check_division,
    check_parts_on_gpus,
    context_bounds,
    kv_tokens,
    manual_plan,
    manual_shards,
    model_costs,
    says_placement,
    uses_mtp,
)
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.resources.groups import check_groups, largest_group, no_groups
from llamaclust.cluster.control.resources.placement import check_obeyed, placements
from llamaclust.cluster.control.resources.profiling import WorkerProfiles
from llamaclust.cluster.control.resources.resource_shares import (
    WorkerResources,
    machine_shares,
    memory_shares,
    share_gpus,
)
from llamaclust.cluster.control.serving import is_clearly_faster
from llamaclust.cluster.control.stage_memory import encoder_of, rounding_of, workspace_of
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.costs import GpuFacts, StageCosts, WorkerFacts
from llamaclust.cluster.planner.explain import other_models_error
from llamaclust.cluster.planner.links import UNKNOWN, Links, Pairs
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import PlanRequest, StagePlace
from llamaclust.cluster.planner.plan import Plan, Prediction, UnusedGpu
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.predict import predict_again
from llamaclust.cluster.planner.roofline import retimed
from llamaclust.cluster.planner.splits.encoder_place import EncoderParts, plan_with_encoder
from llamaclust.cluster.scheduler.capacity import BlockCounts
from llamaclust.core.errors import InsufficientMemoryError, NetworkPartitionError, UsageError, WorkerError
from llamaclust.core.gpus import UNUSED_BY_PARTS, Placement
from llamaclust.core.limits import MAX_EXPERT_SHARDS
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.model.costs import ModelCosts
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.codec import MAX_STAGES

MakeClusterPlan = Callable[[ClusterConfig, Model, "ClusterResources"], Plan]
_NO_DIVIDED_MIXTURES = "the experts of layers are divided among workers"
_MOST_PARTS = 512
"""Maximum number of parts (layers times shards) of a model. Planning time grows with the square of this number."""


@dataclass(frozen=True, slots=True)
class ClusterResources:
    workers: Mapping[str, WorkerResources]
    # Profiles by worker. Plans consider only the memory of a worker without a profile.
    profiles: Mapping[str, Profile]
    links: Links = UNKNOWN
    partitions: Pairs = frozenset()  # Pairs of workers that cannot reach each other.
    disputes: Pairs = frozenset()  # Pairs of workers that accuse each other and must not be in one group.
    # Free memory of this machine before its workers held layers. None if each worker reports its own free memory.
    free_bytes: int | None = None
    held: Mapping[tuple[str, str], int] = field(default_factory=dict)
    row_bytes: int = 0  # Bytes that are reserved for image embeddings on this machine, and not part of `free_bytes`.
    encodes: bool = True  # True if a plan must give the model's image encoder, if there is one, to a worker.
    kept_context: int | None = None  # Context length that was chosen at the cluster's start. None: plans choose it.


def plan_cluster(
    config: ClusterConfig, model: Model, resources: ClusterResources, *, max_expert_shards: int = MAX_EXPERT_SHARDS
) -> Plan:
    """Makes a plan. Considers the workers in the order of the cluster file, and then other workers by name. Raises
    InsufficientMemoryError with the missing MiB, UsageError if a manual plan is invalid, and NetworkPartitionError if
    broken links prevent a plan."""
    plan = _plan_in_own_tiles(config, model, resources, max_expert_shards)
    if plan.lacks_kv_memory and resources.held:
        raise other_models_error(plan)
    return _in_wide_tiles(config, model, resources, plan) or plan


def plan_with_optional_encoder(config: ClusterConfig, model: Model, resources: ClusterResources) -> Plan:
    """Plans like `plan_cluster`, but without the image encoder if the model fits only without it."""
    try:
        return plan_cluster(config, model, resources)
    except InsufficientMemoryError as error:
        if model.projector is None or not resources.encodes:
            raise
        free_bytes = None if resources.free_bytes is None else resources.free_bytes + resources.row_bytes
        with suppress(InsufficientMemoryError):
            text_only = replace(resources, free_bytes=free_bytes, row_bytes=0, encodes=False)
            return replace(plan_cluster(config, model, text_only), no_images=str(error))
        raise


def _in_wide_tiles(config: ClusterConfig, model: Model, resources: ClusterResources, own: Plan) -> Plan | None:
    has_gpus = any(worker.gpus for worker in resources.workers.values())
    if not config.wide_tiles or not model.has_wider_tiles or own.expert_shards > 1 or has_gpus:
        return None
    with suppress(InsufficientMemoryError, NetworkPartitionError):
        plan = replace(_divided_plan(config, *_widened(config, model, resources), 1), wide_tiles=True)
        is_roomy = 2 * plan.least_kv_blocks >= own.least_kv_blocks and plan.lacks_kv_memory <= own.lacks_kv_memory
        if is_roomy and is_clearly_faster(plan, own):
            return plan
    return None


def _widened(config: ClusterConfig, model: Model, resources: ClusterResources) -> tuple[Model, ClusterResources]:
    own, wide = model_costs(config, model), model_costs(config, model.widened)
    profiles = resources.profiles.items()
    retimed_profiles = {name: replace(profile, cpu=retimed(profile.cpu, own, wide)) for name, profile in profiles}
    return model.widened, replace(resources, profiles=retimed_profiles)


def _plan_in_own_tiles(
    config: ClusterConfig, model: Model, resources: ClusterResources, max_expert_shards: int
) -> Plan:
    if config.plan is not None:
        return _divided_plan(config, model, resources, manual_shards(config))
    try:
        return _divided_plan(config, model, resources, 1)
    except InsufficientMemoryError as error:
        tried: list[int] = []
        for expert_shards in _divisions(config, model, resources, max_expert_shards):
            with suppress(InsufficientMemoryError, UsageError):
                return _divided_plan(config, model, resources, expert_shards)
            tried.append(expert_shards)
        if not tried:
            raise
        what = f"it does not fit even with the experts of each layer divided into up to {tried[-1]} parts"
        explained = InsufficientMemoryError(f"{error}; {what}")
        explained.missing_bytes = error.missing_bytes
        raise explained from error


def _divisions(config: ClusterConfig, model: Model, resources: ClusterResources, most: int) -> Iterator[int]:
    """Yields each number of expert shards per layer (2, 4, ...) that is worth trying if whole layers do not fit."""
    on_gpus = says_placement(config) or any(worker.gpu_layers for worker in resources.workers.values())
    if (
        most < 2
        or on_gpus
        or uses_mtp(config)
        or not model.hyperparameters.expert_count
        or not _have_room(config, model, resources)
    ):
        return
    shards = 2
    while shards <= min(most, model.hyperparameters.expert_count, _MOST_PARTS // model.layer_count):
        yield shards
        shards *= 2


def _have_room(config: ClusterConfig, model: Model, resources: ClusterResources) -> bool:
    length, costs = context_bounds(config, model).least, StageCosts.of(model_costs(config, model))
    capacity = capacity_of(config, length, model)
    workspace = workspace_of(model, capacity.stage_limits(BlockCounts(1)))
    left = costs.weight_bytes(0, model.layer_count)
    for worker in _worker_facts(config, resources):
        if worker.memory_bytes is None:
            return True
        left -= max(0, worker.memory_bytes - workspace(StagePlace(worker.threads, length, False)))
    return left <= 0


def _divided_plan(config: ClusterConfig, model: Model, resources: ClusterResources, expert_shards: int) -> Plan:
    check_division(config, model, expert_shards)
    bounds, facts = context_bounds(config, model), _worker_facts(config, resources)
    if config.plan is not None:
        gpus = {worker.name: [gpu.device for gpu in worker.gpus] for worker in facts}
        check_parts_on_gpus(config, expert_shards, gpus)
        check_groups(config, model, gpus)
    unused = _unused_gpus(facts) if expert_shards > 1 else ()
    if expert_shards > 1:
        facts = [replace(worker, gpus=(), gpu_layers=None) for worker in facts]
    capacity = capacity_of(config, bounds.least, model)
    request = PlanRequest(
        context_length=bounds.least,
        max_sequences=config.max_sequences,
        workspace=workspace_of(model, capacity.stage_limits(BlockCounts(1), expert_shards)),
        objective=config.objective,
        manual=None if config.plan is None else manual_plan(config),
        kv_memory_bytes=config.kv_memory,
        links=resources.links,
        partitions=resources.partitions,
        disputes=resources.disputes,
        max_batch_tokens=capacity.max_batch_tokens,
        rounding=rounding_of(model) if expert_shards == 1 else lambda device: 0,
        rest_rounding=rounding_of(model, experts=False) if expert_shards == 1 else lambda device: 0,
        experts_cache_bytes=config.experts_cache,
        group_costs=partial(model.group_costs, config.kv_type),
        largest_group=largest_group(config, model) if expert_shards == 1 else 1,
        no_groups=_NO_DIVIDED_MIXTURES if expert_shards > 1 else no_groups(config, model),
        kv_tokens=kv_tokens(config),
        context_bounds=bounds,
        kept_context=None if config.context_length is not None else resources.kept_context,
        max_window=0 if config.speculative is None or not model.generates else config.speculative.max_window,
    )
    wanted = placements(config, model, {worker.name: [gpu.device for gpu in worker.gpus] for worker in facts})
    facts = [replace(worker, placement=wanted[worker.name]) if worker.gpus else worker for worker in facts]
    encoder = encoder_of(model) if resources.encodes else None
    plan = _plan(model_costs(config, model, expert_shards), facts, request, encoder)
    if expert_shards == 1:
        check_obeyed(plan, wanted)
    if len(plan.leaders) > MAX_STAGES:
        raise UsageError(f"the plan has {len(plan.leaders)} stages; the limit is {MAX_STAGES}: use fewer workers")
    held = {stage.worker for stage in plan.stages}
    return replace(plan, unused_gpus=tuple(gpu for gpu in unused if gpu.worker in held))


def _unused_gpus(facts: Iterable[WorkerFacts]) -> tuple[UnusedGpu, ...]:
    return tuple(UnusedGpu(worker.name, gpu.device, UNUSED_BY_PARTS) for worker in facts for gpu in worker.gpus)


def predict_served(config: ClusterConfig, model: Model, resources: ClusterResources, plan: Plan) -> Prediction | None:
    """Predicts the speed of an earlier plan from current profiles and links. Returns None if that is not possible."""
    if plan.wide_tiles:
        model, resources = _widened(config, model, resources)
    costs = StageCosts.of(model_costs(config, model, plan.expert_shards))
    workers = _worker_facts(config, resources)
    by_name = {worker.name: worker for worker in workers}
    return predict_again(
        costs, plan, by_name, config.max_sequences, resources.links, partial(model.group_costs, config.kv_type)
    )


def _plan(costs: ModelCosts, facts: Sequence[WorkerFacts], request: PlanRequest, encoder: EncoderParts | None) -> Plan:
    try:
        return _plan_all(costs, facts, request, encoder)
    except InsufficientMemoryError as error:
        by_memory = [replace(worker, gpu_layers=None) for worker in facts]
        open_placement = Placement(cpu_moe=None)
        without_rules = [replace(worker, placement=open_placement) if worker.gpus else worker for worker in facts]
        ways = {"set gpu_layers to auto": by_memory, "remove placement and cpu_moe": without_rules}
        for way, others in ways.items():
            on_gpus = None if others == list(facts) else _layers_on_gpus(costs, others, request, encoder)
            if on_gpus is not None:
                advice = f"or {way}: the model then fits, with {on_gpus} layers on GPUs"
                raise InsufficientMemoryError(f"{error}; {advice}") from error
        raise


def _plan_all(
    costs: ModelCosts, facts: Sequence[WorkerFacts], request: PlanRequest, encoder: EncoderParts | None
) -> Plan:
    if encoder is None:
        return make_plan(costs, facts, request)

    def make(workers: Sequence[WorkerFacts], by_hand: tuple[Assignment, ...] | None = None) -> Plan:
        return make_plan(costs, workers, request if by_hand is None else replace(request, manual=by_hand))

    is_manual = request.manual is not None
    return plan_with_encoder(encoder, facts, make, is_manual=is_manual, partitions=request.partitions)


def _layers_on_gpus(
    costs: ModelCosts, facts: Sequence[WorkerFacts], request: PlanRequest, encoder: EncoderParts | None
) -> int | None:
    try:
        plan = _plan_all(costs, facts, request, encoder)
    except (InsufficientMemoryError, NetworkPartitionError):
        return None
    devices = [part for stage in plan.stages for part in stage.devices if part.device != "cpu"]
    return sum(part.end - part.start for part in devices)


def _worker_facts(config: ClusterConfig, resources: ClusterResources) -> list[WorkerFacts]:
    held, gpus = resources.held, share_gpus(resources.workers)
    shares = _memory_shares(config, resources)
    memory = {name: max(0, share - held.get((name, "cpu"), 0)) for name, share in shares.items()}
    names = in_order(config, memory)
    reaches = resources.links.reaches(names)
    facts = []
    for name in names:
        own, profile = resources.workers[name], resources.profiles.get(name)
        cpu = None if profile is None else profile.cpu
        worker = WorkerFacts(name, memory[name], cpu, own.threads, reaches[name], joins_groups=own.joins_groups)
        facts.append(with_gpus(worker, _beside(gpus[name], name, held), profile))
    return facts


def _beside(resources: WorkerResources, worker: str, held: Mapping[tuple[str, str], int]) -> WorkerResources:
    free = ((gpu, max(0, gpu.free_bytes - held.get((worker, gpu.device), 0))) for gpu in resources.gpus)
    return replace(resources, gpus=tuple(replace(gpu, free_bytes=free_bytes) for gpu, free_bytes in free))


def in_order(config: ClusterConfig, names: Iterable[str]) -> list[str]:
    order = {worker.name: index for index, worker in enumerate(config.workers)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def _memory_shares(config: ClusterConfig, resources: ClusterResources) -> dict[str, int]:
    if resources.free_bytes is None:
        return machine_shares(resources.workers)
    capped = {worker.name for worker in config.workers if worker.memory is not None}
    capped |= {name for name, worker in resources.workers.items() if worker.is_fresh}
    caps = {name: worker.free_memory_bytes if name in capped else None for name, worker in resources.workers.items()}
    return memory_shares(caps, resources.free_bytes)


def with_gpus(facts: WorkerFacts, resources: WorkerResources, profile: Profile | None) -> WorkerFacts:
    if not resources.gpus:
        return facts
    profiles: Sequence[DeviceProfile | None] = () if profile is None else profile.gpus
    if len(profiles) != len(resources.gpus):
        profiles = (None,) * len(resources.gpus)
    known = zip(resources.gpus, profiles, strict=True)
    gpus = tuple(GpuFacts(gpu.device, gpu.free_bytes, of) for gpu, of in known)
    return replace(facts, gpus=gpus, gpu_layers=resources.gpu_layers)


@dataclass(eq=False)
class ClusterPlanner:
    config: ClusterConfig
    model: Model
    profiles: WorkerProfiles
    free_bytes: int | None = None  # Same as in `ClusterResources`.
    row_bytes: int = 0  # Same as in `ClusterResources`.
    encodes: bool = True  # False if the model reads only text, because its image encoder did not fit at the start.
    kept_context: int | None = None  # Same as in `ClusterResources`. It is set when the first epoch serves.
    links: Links = UNKNOWN
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    # Workers that the last plan left out because they cannot obey the placement rules, with the reasons.
    unfit: dict[str, str] = field(default_factory=dict, init=False)
    _thread: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "planner"), init=False)
    """Planning has its own thread, so that a recovery does not wait for other work."""

    @property
    def reads_images(self) -> bool:
        return self.encodes and self.model.projector is not None

    def update(self, links: Links) -> bool:
        changed, self.links = links != self.links, links
        return changed

    async def plan(
        self,
        workers: Mapping[str, WorkerHandle],
        partitions: Pairs = frozenset(),
        beside: MemoryLedger | None = None,
        *,
        disputes: Pairs = frozenset(),
        needs_images: bool = False,
        context: int | None = None,
    ) -> Plan:
        """Makes a plan in a thread, with `context` tokens of context, or else `kept_context`. Leaves out workers that
        cannot obey the placement rules. Unless `needs_images` is set or other models use memory, also leaves out an
        image encoder that does not fit. Raises the errors of `plan_cluster`, ModelLimitError if too many models are
        loaded, and WorkerError if a worker is absent."""
        self.unfit = {}
        (beside or self.ledger).check_count(self.model.model_id)
        planned = (name for entry in self.config.plan or () for name in entry.names)
        if missing := [name for name in planned if name not in workers]:
            raise WorkerError(f"the plan needs workers that are not connected: {', '.join(missing)}")
        if not workers:
            raise WorkerError("no worker is left")
        closed = (workers[name].closed_port for entry in self.config.plan or () for name in entry.workers or ())
        if why := next(filter(None, closed), ""):
            raise NetworkPartitionError(why)
        held = (beside or self.ledger).beside(self.model.model_id)
        kept, resources = context or self.kept_context, self.resources(workers, partitions)
        resources = replace(resources, disputes=disputes, held=held, kept_context=kept)
        make: MakeClusterPlan = plan_cluster if needs_images or resources.held else plan_with_optional_encoder
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._thread, make, self.config, self.model, resources)
            except UsageError as error:
                others = {name: of for name, of in resources.workers.items() if name != error.worker}
                if self.config.plan is not None or not 0 < len(others) < len(resources.workers):
                    raise
                self.unfit[error.worker or ""] = str(error)
                resources = replace(resources, workers=others)

    async def predict(self, plan: Plan, workers: Mapping[str, WorkerHandle]) -> Prediction | None:
        loop, resources = asyncio.get_running_loop(), self.resources(workers)
        return await loop.run_in_executor(self._thread, predict_served, self.config, self.model, resources, plan)

    def resources(self, workers: Mapping[str, WorkerHandle], partitions: Pairs = frozenset()) -> ClusterResources:
        known = {name: WorkerResources.of(worker) for name, worker in workers.items()}
        return ClusterResources(
            known,
            self.profiles.of(workers),
            self.links,
            partitions,
            free_bytes=self.free_bytes,
            held=self.ledger.beside(self.model.model_id),
            row_bytes=self.row_bytes,
            encodes=self.encodes,
            kept_context=self.kept_context,
        )
