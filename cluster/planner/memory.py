"""Calculates the memory that stages need for weights, KV blocks and workspace, and how much of it is missing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from llamaclust.cluster.planner.context import ContextBounds
from llamaclust.cluster.planner.costs import Counts, StageCosts, Table, WorkerFacts, sums
from llamaclust.cluster.planner.devices import DeviceNeeds, Division, MoeLayers, PlannedLayers, devices_of, divide
from llamaclust.cluster.planner.links import UNKNOWN, Links, Pairs
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.stage_parts import GroupCostsOf
from llamaclust.cluster.scheduler.kv.groups import KvGroups, KvSizes
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.core.limits import MAX_KV_BLOCKS
from llamaclust.model.groups.portion import Portion
from llamaclust.model.program import KV_BLOCK_TOKENS

_KV_SHARE = 2
"""Divisor of the memory that weights and workspace leave free: KV memory takes this part, unless one sequence of the
shortest context needs more."""
_CACHED_KV_SHARE = 4
"""Divisor in place of `_KV_SHARE` for the choice of a context on a GPU that uses free memory to cache experts."""


@dataclass(frozen=True, slots=True)
class StagePlace:
    """Facts that determine the workspace of a stage."""

    threads: int
    context_length: int
    is_last: bool  # True if the stage has the head.
    device: str = "cpu"
    # Layers [start, end) of the stage. None stands for the stage with the largest workspace.
    layers: tuple[int, int] | None = None
    portion: Portion | None = None  # Portion of the stage that a group member holds.


Workspace = Callable[[StagePlace], int]
"""Returns the bytes of workspace for a `StagePlace`. Must cache its results."""
Rounding = Callable[[str], Counts | int]
"""Returns the bytes that rounding to allocation units adds to the weights on a device. Must cache its results."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    context_length: int
    max_sequences: int
    workspace: Workspace
    objective: str = "latency"  # "latency" or "throughput".
    manual: tuple[Assignment, ...] | None = None
    # Maximum KV memory per device (RAM, or a GPU). None: half of the memory that weights and workspace leave.
    kv_memory_bytes: int | None = None
    links: Links = UNKNOWN
    partitions: Pairs = frozenset()  # Pairs of workers that cannot reach each other.
    disputes: Pairs = frozenset()  # Pairs of workers that accuse each other and must not be in one group.
    max_batch_tokens: int = 0  # Maximum number of rows in a microbatch.
    rounding: Rounding = lambda device: 0
    rest_rounding: Rounding = lambda device: 0  # Rounding of layers without their experts.
    # Maximum GPU bytes for copies of experts in RAM. None: all free bytes.
    experts_cache_bytes: int | None = None
    max_window: int = MAX_WINDOW  # Maximum number of drafted tokens per sequence in a step.
    group_costs: GroupCostsOf | None = None  # None: groups are not possible.
    largest_group: int = 1  # Maximum number of workers in a group of an automatic plan.
    no_groups: str = ""  # Reason why automatic plans have no groups, even if workers could form them.
    # Maximum number of tokens to plan KV memory for if `kv_memory_bytes` is None. None: `context_length` per sequence.
    kv_tokens: int | None = None
    # Context lengths among which the plan chooses after its layers are placed for `context_length`. None: no choice.
    context_bounds: ContextBounds | None = None
    kept_context: int | None = None  # Context length that was chosen earlier. It replaces the choice.
    least_window_blocks: int = 0  # Minimum number of blocks for layers with a sliding window, if they have their own.

    @property
    def ungrouped(self) -> Pairs:
        """Pairs of workers that must not be in one group."""
        return self.partitions | self.disputes

    @property
    def most_blocks(self) -> int:
        most = self.context_blocks * self.max_sequences
        if self.kv_tokens is None:
            return most
        return min(most, max(self.context_blocks, -(-self.kv_tokens // KV_BLOCK_TOKENS)))

    @property
    def context_blocks(self) -> int:
        return -(-self.context_length // KV_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    stages: StageCosts
    request: PlanRequest
    portion: Portion | None = None  # Portion of the group member whose costs `stages` has.

    def of(self, stages: StageCosts, portion: Portion | None = None) -> MemoryModel:
        return self if stages is self.stages else replace(self, stages=stages, portion=portion)

    def workspace_bytes(self, worker: WorkerFacts, start: int, end: int, cpu_moe: Sequence[int] = ()) -> int:
        """Returns the bytes of a stage's workspace and of the padding of its weights to whole allocation units. The
        padding of experts in `cpu_moe` layers does not count."""
        whole, freed = self.request.rounding(worker.device), self._expert_rounding(worker)
        rounding = whole if isinstance(whole, int) else int(whole[start, end])
        return self._workspace_to(worker, end) + rounding - int(freed[list(cpu_moe)].sum())

    def workspace_of(self, held: PlannedLayers) -> int:
        """Returns the bytes of workspace for the layers in `held`. The value is exact on CPUs."""
        device, start, end = held.device, held.start, held.end
        if held.is_experts or held.cpu_moe or device.device != "cpu":
            return self.parts(held, 0)["workspace"]
        is_last = end == self.stages.layers
        place = StagePlace(device.threads, self.request.context_length, is_last, "cpu", (start, end), self.portion)
        return self.request.workspace(place)

    def _expert_rounding(self, worker: WorkerFacts) -> Counts:
        rounding = np.asarray(self.request.rounding(worker.device)) - self.request.rest_rounding(worker.device)
        each: Counts = np.diagonal(np.broadcast_to(rounding, self.stages.held_bytes.shape), 1)
        return each

    def _workspace_to(self, worker: WorkerFacts, end: int) -> int:
        is_last, context_length = end == self.stages.layers, self.request.context_length
        return self.request.workspace(
            StagePlace(worker.threads, context_length, is_last, worker.device, portion=self.portion)
        )

    @property
    def kv_groups(self) -> KvGroups:
        stages, request = self.stages, self.request
        groups = KvGroups.of(stages.model, request.context_length, request.max_sequences, request.max_batch_tokens)
        return replace(groups, least_window_blocks=request.least_window_blocks)

    @property
    def max_drafted(self) -> int:
        """Maximum number of drafted tokens in a step. It is 0 for models with recurrent states."""
        if self.stages.state_bytes[0, self.stages.layers]:
            return 0
        window = self.kv_groups.window
        return min(self.request.max_window, MAX_WINDOW if window is None else window.drafted_rows)

    def kv_bytes(self, start: int, end: int, kv_blocks: int) -> int:
        return int(self._kv_table(kv_blocks)[start, end])

    def _kv_table(self, kv_blocks: int) -> Counts:
        stages = self.stages
        sizes = KvSizes(stages.kv_token_bytes, stages.window_token_bytes, stages.state_bytes)
        return self.kv_groups.kv_bytes(sizes, kv_blocks)

    def _blocks_in(self, start: int, end: int, kv_bytes: int, most: int) -> int:
        if self.kv_groups.window is None and self.kv_groups.states is None:
            block_bytes = int(self.stages.kv_token_bytes[start, end]) * KV_BLOCK_TOKENS
            if block_bytes == 0:  # The stage has feed-forward layers only.
                return most if kv_bytes >= 0 else 0
            return min(most, kv_bytes // block_bytes)
        if self.stages.kv_token_bytes[start, end] == self.stages.window_token_bytes[start, end]:
            # All layers have a sliding window, so more blocks would need no more memory. A limit applies instead.
            most = min(most, self.request.context_blocks * self.request.max_sequences)
        return bisect_right(range(1, most + 1), kv_bytes, key=lambda blocks: self.kv_bytes(start, end, blocks))

    def context_bytes(self, start: int, end: int, contexts: int = 1) -> int:
        return self.kv_bytes(start, end, contexts * self.request.context_blocks)

    def parts(self, held: PlannedLayers, contexts: int) -> Mapping[str, int]:
        """Returns bytes by kind of memory. KV memory holds `contexts` full-length sequences, up to the user's limit."""
        device, start, end = held.device, held.start, held.end
        if held.is_experts:
            return {"weights": self.weight_bytes(held), "workspace": self._workspace_to(device, end - 1)}
        kv, given = self.context_bytes(start, end, contexts) if contexts else 0, self.request.kv_memory_bytes
        return {
            "weights": self.weight_bytes(held),
            "KV memory": kv if given is None else min(kv, given),
            "workspace": self.workspace_bytes(device, start, end, held.cpu_moe),
        }

    def weight_bytes(self, held: PlannedLayers) -> int:
        moved = sum(int(self.stages.expert_bytes[layer, layer + 1]) for layer in held.cpu_moe)
        return moved if held.is_experts else self.stages.weight_bytes(held.start, held.end) - moved

    def kv_blocks(self, split: Sequence[PlannedLayers]) -> int:
        """Returns how many KV blocks fit on every device, at most `most_blocks` if the user has not set `kv_memory`."""
        most = self.request.most_blocks
        beside = self._beside(split)
        return min((self._held_blocks(held, beside.get(held.place, 0), most) for held in split), default=0)

    def _held_blocks(self, held: PlannedLayers, beside_bytes: int, most: int) -> int:
        given, memory_bytes = self.request.kv_memory_bytes, held.device.memory_bytes
        if held.is_experts:
            return MAX_KV_BLOCKS if memory_bytes is None or beside_bytes <= memory_bytes else 0
        if memory_bytes is None:
            return most if given is None else self._blocks_in(held.start, held.end, given, MAX_KV_BLOCKS)
        left = memory_bytes - beside_bytes - sum(self.parts(held, 0).values())
        if given is not None:
            return self._blocks_in(held.start, held.end, min(given, left), MAX_KV_BLOCKS)
        least = min(self.context_bytes(held.start, held.end), left)
        return self._blocks_in(held.start, held.end, max(least, left // _KV_SHARE), most)

    def context_shortfall(self, split: Sequence[PlannedLayers]) -> int:
        """Returns the bytes that devices lack for a full-length sequence in the usual share of the memory that weights
        and workspace leave. If the user has set `kv_memory`, the sequence may take all of it."""
        beside = self._beside(split)
        return sum(self._context_shortfall(held, beside.get(held.place, 0)) for held in split if not held.is_experts)

    def _context_shortfall(self, held: PlannedLayers, beside_bytes: int) -> int:
        kv, given = self.context_bytes(held.start, held.end), self.request.kv_memory_bytes
        memory_bytes = held.device.memory_bytes
        over = 0 if given is None else max(0, kv - given)
        if memory_bytes is None:
            return over
        share = 1 if given is not None else _CACHED_KV_SHARE if held.cpu_moe else _KV_SHARE
        return max(over, beside_bytes + sum(self.parts(held, 0).values()) + share * kv - memory_bytes)

    def _beside(self, split: Sequence[PlannedLayers]) -> Mapping[tuple[str, str], int]:
        """Returns the bytes of experts in RAM by worker and device. Other layers may share the RAM with them."""
        beside: dict[tuple[str, str], int] = {}
        for held in split:
            if held.is_experts:
                beside[held.place] = beside.get(held.place, 0) + sum(self.parts(held, 0).values())
        return beside

    def shortfall_table(self, worker: WorkerFacts, contexts: int) -> Table:
        """Returns the bytes that stages lack for `contexts` full-length sequences, or infinity for empty stages."""
        return self._shortfall(self.division(worker, contexts), contexts)

    def excess_table(self, worker: WorkerFacts, contexts: int) -> Table:
        """Returns the bytes that a worker without GPUs lacks for each stage. Negative values are free bytes."""
        return self._needs(worker, contexts, None).excess

    def _shortfall(self, division: Division, contexts: int) -> Table:
        starts, ends = division.bounds[0], division.bounds[-1]
        total: Table = np.where(starts < ends, 0.0, np.inf)
        in_ram = self._in_ram(division)
        for number, (device, begin, until, moe_end) in enumerate(division.parts()):
            needs = self._needs(device, contexts, division.moe if number else None)
            excess = needs.excess[begin, until] - (needs.experts[moe_end] - needs.experts[begin])
            here = begin < until
            if number == 0 and len(division.devices) > 1:
                alone = in_ram - (np.inf if device.memory_bytes is None else device.memory_bytes)
                excess = np.where(here, excess + in_ram, alone)
                here = here | (in_ram > 0)
            total += np.where(here, np.maximum(excess, 0), 0.0)
        return total

    def _in_ram(self, division: Division) -> Table:
        total: Table = np.zeros(division.bounds[0].shape)
        workspace = self._workspace_to(division.devices[0], self.stages.layers - 1)
        for held_bytes in self._in_ram_beside(division):
            total += held_bytes + np.where(held_bytes > 0, workspace, 0)
        return total

    def _in_ram_beside(self, division: Division) -> Iterator[Counts]:
        found: dict[str, Counts] = {}
        for device, layers, begin, end in division.moved_ranges():
            held_bytes = np.where(begin < end, sums(np.diagonal(self.stages.expert_bytes, 1) * layers)[begin, end], 0)
            found[device.device] = found.get(device.device, 0) + held_bytes
        yield from found.values()

    def _needs(self, device: WorkerFacts, contexts: int, moe: MoeLayers | None) -> DeviceNeeds:
        stages, given = self.stages, self.request.kv_memory_bytes
        context = self._kv_table(self.request.context_blocks)
        excess: Table = np.full(context.shape, -np.inf)
        experts: Counts = np.diagonal(stages.expert_bytes, 1)
        freed = np.where(experts > 0, experts + self._expert_rounding(device), 0)
        is_open = np.zeros_like(stages.mixtures) if moe is None else moe.open
        if device.memory_bytes is not None:
            kv = self._kv_table(contexts * self.request.context_blocks)
            kv = kv if given is None else np.minimum(kv, given)
            last = stages.layers  # Only a stage that ends there computes the output.
            workspace = np.full(last + 1, self._workspace_to(device, 0))
            workspace[last] = self._workspace_to(device, last)
            held = stages.held_bytes + self.request.rounding(device.device)
            held = held if moe is None else held - sums(freed * moe.fixed)
            excess = (held + kv + workspace - device.memory_bytes).astype(np.float64)
        if given is not None:
            excess = np.maximum(excess, np.where(context > given, context - given, -np.inf))
        return DeviceNeeds(excess, sums(freed * is_open)[0], sums(experts * is_open)[0])

    def division(self, worker: WorkerFacts, contexts: int) -> Division:
        """Divides every stage among a worker's devices. Experts go to RAM if that fits better or is faster."""
        moe, possible = MoeLayers.of(worker.placement, self.stages.mixtures), self.stages.possible

        def needs(device: WorkerFacts) -> DeviceNeeds:
            return self._needs(device, contexts, moe)

        whole = divide(worker, possible, needs, moe)
        if not worker.gpus or not moe.open.any():
            return whole
        apart = divide(worker, possible, needs, moe, apart=True)
        lacks, lacks_apart = (self._shortfall(way, contexts) for way in (whole, apart))
        is_faster = np.ones(lacks.shape, np.bool_)
        if all(device.profile is not None for device in devices_of(worker)):
            is_faster = self._token_s(apart) < self._token_s(whole)
        return whole.where(apart, (lacks_apart < lacks) | ((lacks_apart == lacks) & is_faster))

    def _token_s(self, division: Division) -> Table:
        stages = self.stages
        moved = division.moved(
            lambda device, layers: stages.experts_table(device, 1, layers), partial(stages.exchange_table, 1)
        )
        return division.sums(stages.decode_table) + moved

    def held(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> tuple[PlannedLayers, ...]:
        return self.division(worker, contexts).held(start, end) if worker.gpus else (PlannedLayers(worker, start, end),)
