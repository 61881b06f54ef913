"""Calculates the memory of stages in bytes and their time in seconds, from measured steps or from a roofline model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.planner.links import NO_REACH, Link
from llamaclust.cluster.planner.roofline import Roofline
from llamaclust.core.gpus import NO_RULES, Placement
from llamaclust.core.profile import DeviceProfile, at_rows
from llamaclust.model.costs import LayerCost, ModelCosts

Counts = NDArray[np.int64]
Table = NDArray[np.float64]
Flags = NDArray[np.bool_]
_Compute = Callable[[DeviceProfile, str, int, bool], Table]


EXCHANGE_S = 50e-6
"""Seconds to copy activations from a GPU to RAM and back, for experts in RAM. The value is assumed, not measured."""
EXCHANGE_BYTE_S = 1 / 12e9
"""Seconds per byte over PCIe 3.0 with 16 lanes. The value is assumed, not measured."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    device: str
    memory_bytes: int
    profile: DeviceProfile | None = None


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    name: str
    memory_bytes: int | None  # RAM that the worker may use. None: unknown.
    profile: DeviceProfile | None  # Profile of the CPU. None: not measured.
    threads: int = 1
    reach: Link = NO_REACH  # Part of each link's time that is due to this worker (see `Links.reaches`).
    gpus: tuple[GpuFacts, ...] = ()  # GPUs of the worker. The other fields describe its CPU.
    # Number of a stage's layers on GPUs. None: as many as GPU memory allows.
    gpu_layers: int | None = None
    device: str = "cpu"
    joins_groups: bool = False  # True if an automatic plan may put the worker into a group.
    placement: Placement = NO_RULES


@dataclass(frozen=True, slots=True, eq=False)
class StageCosts:
    """Memory and time of every possible stage of a model. Tables have the shape [layers + 1, layers + 1]: table[start,
    end] is the value for layers [start, end). Stages with the first layer include the embedding, and stages with the
    last layer include the head. Entries with end <= start have no meaning."""

    layers: int
    hidden_bytes: int  # Bytes of one row's hidden state at a border between two layers.
    # Bytes that are sent per row at each border. Borders inside a mixture of experts need more than `hidden_bytes`.
    border_bytes: Counts
    expert_shards: int  # Number of parts per layer. Each part counts as one of `layers`.
    held_bytes: Counts  # Bytes of the weights in memory.
    kv_token_bytes: Counts  # Bytes of one token's keys and values.
    state_bytes: Counts  # Bytes of one sequence's states.
    window_token_bytes: Counts  # The part of `kv_token_bytes` in layers with a sliding window.
    # True for stages whose layers read no keys and values of other stages.
    possible: NDArray[np.bool_]
    expert_bytes: Counts  # Bytes of routers and experts, which are part of the weights.
    model: ModelCosts
    _kinds: tuple[LayerCost, ...]  # The distinct layer costs.
    _kind_of: Counts  # Index into `_kinds` for each layer.
    _head: Counts  # 1 for stages with the head, which prefill does not need.
    # Fraction of the output head that a group member computes. Steps are measured with the whole head.
    head_share: float = 1.0
    _tables: dict[Hashable, Table] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, costs: ModelCosts, head_share: float = 1.0) -> StageCosts:
        read = sums(layer.weight_bytes for layer in costs.layers)
        first, last = np.zeros_like(read), np.zeros_like(read)
        kinds = {layer: number for number, layer in enumerate(dict.fromkeys(costs.layers))}
        first[0, :], last[:, -1] = 1, 1
        return cls(
            layers=len(costs.layers),
            hidden_bytes=costs.hidden_bytes,
            border_bytes=_border_bytes(costs),
            expert_shards=costs.expert_shards,
            held_bytes=read
            + last * (costs.head_bytes + costs.nextn_bytes)
            + first * costs.embedding_bytes
            - first * last * costs.tied_bytes
            + last * (1 - first) * costs.nextn_embedding_bytes
            - _saved_bytes(costs),
            kv_token_bytes=sums(layer.kv_bytes_per_token for layer in costs.layers),
            state_bytes=sums(layer.state_bytes for layer in costs.layers),
            window_token_bytes=sums(layer.window_bytes_per_token for layer in costs.layers),
            possible=_possible(costs),
            expert_bytes=sums(layer.expert_bytes for layer in costs.layers),
            model=costs,
            _kinds=(*kinds,),
            _kind_of=np.array([kinds[layer] for layer in costs.layers], np.int64),
            _head=last,
            head_share=head_share,
        )

    def weight_bytes(self, start: int, end: int) -> int:
        return int(self.held_bytes[start, end])

    def touched_bytes(self, start: int, end: int) -> int:
        return round(float(self._touched(1)[start, end]) + self.model.head_bytes * int(self._head[start, end]))

    def touched_expert_bytes(self, layers: Iterable[int]) -> int:
        return round(sum(self.model.layers[layer].touched_expert_bytes(1) for layer in layers))

    @property
    def mixtures(self) -> Flags:
        return np.array([layer.expert_bytes > 0 for layer in self.model.layers], np.bool_)

    def decode_s(self, worker: WorkerFacts, start: int, end: int, rows: int = 1, *, concurrent: bool = False) -> float:
        """Returns the seconds of a decode step. `concurrent` means that other stages compute at the same time."""
        return float(self.decode_table(worker, rows, concurrent=concurrent)[start, end])

    def prefill_s(self, worker: WorkerFacts, start: int, end: int, rows: int, *, concurrent: bool = False) -> float:
        return float(self.prefill_table(worker, rows, concurrent=concurrent)[start, end])

    def decode_table(self, worker: WorkerFacts, rows: int = 1, *, concurrent: bool = False) -> Table:
        return self._table(self._decode_table, worker, rows, concurrent)

    def prefill_table(self, worker: WorkerFacts, rows: int, *, concurrent: bool = False) -> Table:
        return self._table(self._prefill_table, worker, rows, concurrent)

    def _table(self, compute: _Compute, worker: WorkerFacts, rows: int, concurrent: bool) -> Table:
        profile = worker.profile
        assert profile is not None
        key = compute.__name__, profile, worker.device, rows, concurrent
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = compute(profile, worker.device, rows, concurrent)
            table.flags.writeable = False
        return table

    def _decode_table(self, profile: DeviceProfile, device: str, rows: int, concurrent: bool) -> Table:
        if times := profile.step_times(concurrent=concurrent):
            point = at_rows(times, rows)
            ends_s = point.stage_s + (np.arange(self.layers + 1) == self.layers) * self.head_share * point.head_s
            decode: Table = self._moved(rows, rows) * point.layers_byte_s + ends_s
            return decode
        roofline = Roofline.of(profile, device, self.hidden_bytes, concurrent=concurrent)
        return self._roofline_s(roofline, rows, rows) + self._head * roofline.head_s(self.model, rows)

    def _prefill_table(self, profile: DeviceProfile, device: str, rows: int, concurrent: bool) -> Table:
        if times := profile.step_times(concurrent=concurrent):
            point = at_rows(times, rows)
            return self._prefilled(rows) * point.layers_byte_s + point.stage_s
        return self._roofline_s(Roofline.of(profile, device, self.hidden_bytes, concurrent=concurrent), rows, 1)

    def experts_table(self, worker: WorkerFacts, rows: int, layers: Flags, *, concurrent: bool = False) -> Table:
        """Returns a table of the seconds that routers and experts of the flagged `layers` take in each stage."""
        profile = worker.profile
        assert profile is not None
        if times := profile.step_times(concurrent=concurrent):
            each = [layer.touched_expert_bytes(rows) for layer in self.model.layers]
            return _float_sums(np.where(layers, each, 0.0)) * at_rows(times, rows).layers_byte_s
        roofline = Roofline.of(profile, worker.device, self.hidden_bytes, concurrent=concurrent)
        return _float_sums(np.where(layers, [roofline.experts_s(layer, rows) for layer in self.model.layers], 0.0))

    def exchange_table(self, rows: int, layers: Flags) -> Table:
        """Returns a table of the seconds that each stage takes to copy inputs and outputs of experts between a GPU and
        RAM. `layers` is true for layers whose experts are in RAM."""
        each_s = EXCHANGE_S + EXCHANGE_BYTE_S * 2 * rows * self.hidden_bytes
        seconds: Table = _float_sums((layers & self.mixtures).astype(np.float64)) * each_s
        return seconds

    def _touched(self, rows: int) -> Table:
        return self._sums(lambda layer: layer.touched_bytes(rows))

    def _moved(self, rows: int, sequences: int) -> Table:
        return self._sums(lambda layer: layer.moved_bytes(rows, sequences))

    def _roofline_s(self, roofline: Roofline, rows: int, sequences: int) -> Table:
        return self._sums(lambda layer: roofline.layer_s(layer, rows, sequences))

    def _sums(self, value: Callable[[LayerCost], float]) -> Table:
        values = np.array([value(kind) for kind in self._kinds], np.float64)[self._kind_of]
        before: Table = np.concatenate([[0.0], np.cumsum(values)])
        return before - before[:, np.newaxis]

    def _prefilled(self, rows: int) -> Table:
        # If there are layers with experts, these were measured. A dense layer counts as at least the bytes that they
        # move for the same number of multiply-accumulates.
        mixtures = [layer for layer in self.model.layers if layer.idle_bytes]
        macs = sum(layer.macs_per_token for layer in mixtures)
        mac_bytes = sum(layer.moved_bytes(rows, 1) for layer in mixtures) / macs if macs else 0.0
        return _float_sums(
            layer.moved_bytes(rows, 1)
            if layer.idle_bytes
            else max(layer.moved_bytes(rows, 1), layer.macs_per_token * mac_bytes)
            for layer in self.model.layers
        )


def _possible(costs: ModelCosts) -> NDArray[np.bool_]:
    borders = np.zeros(len(costs.layers) + 1, np.bool_)
    borders[list(costs.borders)] = True
    return np.logical_and.outer(borders, borders)


def _saved_bytes(costs: ModelCosts) -> Counts:
    """Returns, for each stage, the bytes saved because whole layers are smaller than the sum of their shards."""
    shards, layers = costs.expert_shards, costs.layers
    before = np.array([0, *accumulate(layer.saved_bytes for layer in layers[::shards])], np.int64)
    borders = np.arange(len(layers) + 1)
    starts, ends = -(-borders // shards), borders // shards
    saved: Counts = np.maximum(before[ends] - before[starts][:, np.newaxis], 0)
    return saved


def _border_bytes(costs: ModelCosts) -> Counts:
    inside = np.arange(len(costs.layers) + 1) % costs.expert_shards > 0
    crossing: Counts = np.where(inside, costs.cut_bytes, costs.hidden_bytes)
    return crossing


def sums(values: Iterable[int]) -> Counts:
    before: Counts = np.array([0, *accumulate(values)], np.int64)
    return before - before[:, np.newaxis]


def _float_sums(values: Iterable[float]) -> Table:
    before: Table = np.array([0.0, *accumulate(values)])
    return before - before[:, np.newaxis]
