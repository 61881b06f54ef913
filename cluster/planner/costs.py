"""Costs of a stage on a worker: bytes of memory, and seconds by measured steps of the model, or else by the roofline of
memory bandwidth and 8-bit products. Seconds are those of the bytes that a step touches, of which a mixture of experts
has fewer than it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.planner.links import NO_REACH, Link
from llamaclust.core.profile import DeviceProfile, at_rows
from llamaclust.model.loader import LayerCost, ModelCosts

Counts = NDArray[np.int64]
Table = NDArray[np.float64]


_EXCHANGE_S = 50e-6
"""Two waits for a GPU and two copies; an assumption, since no GPU was there to measure it."""
_EXCHANGE_BYTE_S = 1 / 12e9
"""PCIe 3.0 with 16 lanes, a common one; likewise."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU of a worker as the planner sees it; None where unknown."""

    device: str
    memory_bytes: int  # what the worker may take of it
    profile: DeviceProfile | None = None


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker as the planner sees it; None where unknown."""

    name: str
    memory_bytes: int | None  # what it may take, in all
    profile: DeviceProfile | None  # of its processor
    threads: int = 1
    reach: Link = NO_REACH  # what it adds to links
    gpus: tuple[GpuFacts, ...] = ()  # beside its processor, of which all the rest is told
    gpu_layers: int | None = None  # of a stage, on its GPUs; None: as many as they have memory for
    device: str = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class StageCosts:
    """Sums over layers [start, end) of a model, with embedding and head where they belong.

    Tables and counts are [layers + 1, layers + 1], by start and end; what stands where end <= start means nothing.
    """

    layers: int
    hidden_bytes: int  # of a row, between stages
    held_bytes: Counts  # weights
    kv_token_bytes: Counts  # KV memory of a token
    state_bytes: Counts  # of a state of a sequence
    window_token_bytes: Counts  # of it, that of layers with a window
    window: int | None  # the largest one
    possible: NDArray[np.bool_]  # stages whose layers read keys and values of their own stage
    expert_bytes: Counts  # of weights: routers and experts
    _each: tuple[LayerCost, ...]
    _head: Counts  # weights of the head where a stage has it; prefill does not need it
    _macs: Counts
    _layers_macs: Counts  # without the head

    @classmethod
    def of(cls, costs: ModelCosts) -> StageCosts:
        read = sums(layer.weight_bytes for layer in costs.layers)
        macs = sums(layer.macs_per_token for layer in costs.layers)
        first, last = np.zeros_like(read), np.zeros_like(read)
        first[0, :], last[:, -1] = 1, 1
        head = last * costs.head_bytes
        return cls(
            layers=len(costs.layers),
            hidden_bytes=costs.hidden_bytes,
            held_bytes=read + head + first * costs.embedding_bytes,
            kv_token_bytes=sums(layer.kv_bytes_per_token for layer in costs.layers),
            state_bytes=sums(layer.state_bytes for layer in costs.layers),
            window_token_bytes=sums(layer.window_bytes_per_token for layer in costs.layers),
            window=costs.window,
            possible=_possible(costs),
            expert_bytes=sums(layer.expert_bytes for layer in costs.layers),
            _each=costs.layers,
            _head=head,
            _macs=macs + last * costs.head_macs,
            _layers_macs=macs,
        )

    def weight_bytes(self, start: int, end: int) -> int:
        return int(self.held_bytes[start, end])

    def touched_bytes(self, start: int, end: int) -> int:
        """Weights that a token of one sequence reads."""
        return round(float((self._touched(1) + self._head)[start, end]))

    def touched_expert_bytes(self, start: int, end: int) -> int:
        """Of these, routers and experts."""
        return round(sum(layer.touched_expert_bytes(1) for layer in self._each[start:end]))

    def decode_s(self, worker: WorkerFacts, start: int, end: int, rows: int = 1, *, concurrent: bool = False) -> float:
        """One microbatch that decodes a token of each of `rows` sequences; `concurrent`: other stages of the machine
        compute too. The worker has a profile."""
        return float(self.decode_table(worker, rows, concurrent=concurrent)[start, end])

    def prefill_s(self, worker: WorkerFacts, start: int, end: int, rows: int, *, concurrent: bool = False) -> float:
        """One microbatch of that many prompt tokens, none of them an output row."""
        return float(self.prefill_table(worker, rows, concurrent=concurrent)[start, end])

    def decode_table(self, worker: WorkerFacts, rows: int = 1, *, concurrent: bool = False) -> Table:
        """`decode_s` of all stages."""
        assert worker.profile is not None
        if times := worker.profile.step_times(concurrent=concurrent):
            point = at_rows(times, rows)
            ends_s = point.stage_s + (np.arange(self.layers + 1) == self.layers) * point.head_s
            decode: Table = self._touched(rows) * point.layers_byte_s + ends_s
            return decode
        return _roofline_s(worker.profile, self._touched(rows) + self._head, rows * self._macs)

    def prefill_table(self, worker: WorkerFacts, rows: int, *, concurrent: bool = False) -> Table:
        """`prefill_s` of all stages."""
        assert worker.profile is not None
        if times := worker.profile.step_times(concurrent=concurrent):
            point = at_rows(times, rows)
            return self._prefilled(rows) * point.layers_byte_s + point.stage_s
        return _roofline_s(worker.profile, self._touched(rows), rows * self._layers_macs)

    def experts_table(self, worker: WorkerFacts, rows: int, *, concurrent: bool = False) -> Table:
        """What routers and experts of all stages take of a step of so many rows."""
        assert worker.profile is not None
        touched = _float_sums(layer.touched_expert_bytes(rows) for layer in self._each)
        if times := worker.profile.step_times(concurrent=concurrent):
            return touched * at_rows(times, rows).layers_byte_s
        return _roofline_s(worker.profile, touched, rows * sums(layer.expert_macs_per_token for layer in self._each))

    def exchange_table(self, rows: int) -> Table:
        """What mixtures of all stages take of such a step to bring their input to another device, and the sum back."""
        each_s = _EXCHANGE_S + _EXCHANGE_BYTE_S * 2 * rows * self.hidden_bytes
        seconds: Table = _float_sums(float(layer.expert_bytes > 0) for layer in self._each) * each_s
        return seconds

    def _touched(self, rows: int) -> Table:
        """Bytes of layers that a step of so many rows reads."""
        return _float_sums(layer.touched_bytes(rows) for layer in self._each)

    def _prefilled(self, rows: int) -> Table:
        """The same, but layers without experts beside a mixture count as many bytes as mixtures with their products:
        products take the time of a prompt, and seconds are measured on mixtures."""
        mixtures = [layer for layer in self._each if layer.idle_bytes]
        macs = sum(layer.macs_per_token for layer in mixtures)
        mac_bytes = sum(layer.touched_bytes(rows) for layer in mixtures) / macs if macs else 0.0
        return _float_sums(
            layer.touched_bytes(rows) if layer.idle_bytes else max(layer.weight_bytes, layer.macs_per_token * mac_bytes)
            for layer in self._each
        )


def _possible(costs: ModelCosts) -> NDArray[np.bool_]:
    """By start and end: no border stands between a layer and the one whose keys and values it reads."""
    borders = np.ones(len(costs.layers) + 1, np.bool_)
    for number, layer in enumerate(costs.layers):
        if layer.kv_source is not None:
            borders[layer.kv_source + 1 : number + 1] = False
    return np.logical_and.outer(borders, borders)


def sums(values: Iterable[int]) -> Counts:
    """Of values [start, end), by start and end."""
    before: Counts = np.array([0, *accumulate(values)], np.int64)
    return before - before[:, np.newaxis]


def _float_sums(values: Iterable[float]) -> Table:
    before: Table = np.array([0.0, *accumulate(values)])
    return before - before[:, np.newaxis]


def _roofline_s(profile: DeviceProfile, read_bytes: Table, macs: Counts) -> Table:
    return np.maximum(read_bytes / profile.read_bytes_s, macs / profile.int8_macs_s)
