"""Computes a model's bytes and multiply-accumulates on a GPU, alone or with the CPU, and their minimum time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Self

from llamaclust.core.gpus import DeviceLayers
from llamaclust.kernels.split_experts import experts_of, mixtures_of
from llamaclust.model.costs import LayerCost, layer_cost
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.tools.bench.stage import stage_limits


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes or multiply-accumulates on the GPU and on the CPU, or their rates per second."""

    gpu: float
    cpu: float

    def each_s(self, rates: Amount) -> tuple[float, float]:
        return self.gpu / rates.gpu, self.cpu / rates.cpu if self.cpu else 0.0

    def seconds(self, rates: Amount) -> float:
        return sum(self.each_s(rates))


@dataclass(frozen=True, slots=True)
class Rates:
    read: Amount  # Bytes per second.
    int8: Amount  # Multiply-accumulates per second.

    def best(self, other: Rates) -> Rates:
        """Returns the larger rate of each kind, since other work on the machine can only lower a measured rate."""
        read, int8 = (
            Amount(*map(max, astuple(mine), astuple(its)))
            for mine, its in ((self.read, other.read), (self.int8, other.int8))
        )
        return Rates(read, int8)


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a model whose last layers and head are on the GPU. The experts of some of these layers are in RAM.
    Weights count with their size in the file. A step with more rows reads more experts (`read_file_bytes`)."""

    prompt: int
    generate: int
    sequences: int
    prefill_macs: Amount
    weight_bytes: Mapping[int, Amount]  # Bytes that a step reads, by number of rows: 1, all sequences, a prompt.
    kv_bytes: Amount  # Mean bytes that a step reads for each sequence.
    deep_kv_bytes: Amount  # The same after a prompt.
    expert_bytes: Mapping[int, float] = field(
        default_factory=dict
    )  # Bytes of experts in RAM that a step reads and that GPUs may copy, by number of rows.

    @classmethod
    def of(cls, model: Model, gpu: DeviceLayers, prompt: int, generate: int, sequences: int) -> Self:
        costs, moved = model.costs(KvType.F16), _experts_in_ram(model, gpu.cpu_moe)
        in_ram, on_gpu = costs.layers[: gpu.start], costs.layers[gpu.start :]

        def amount(figure: Callable[[LayerCost], float], of_head: int) -> Amount:
            first, last, experts = (sum(map(figure, layers)) for layers in (in_ram, on_gpu, moved))
            return Amount(of_head + last - experts, first + experts)

        macs = amount(lambda cost: prompt * cost.macs_per_token, costs.head_macs)
        counts = (1, sequences, _prompt_rows(prompt, sequences))
        read = {rows: partial(LayerCost.read_file_bytes, rows=rows) for rows in counts}
        weights = {rows: amount(figure, costs.head_file_bytes) for rows, figure in read.items()}
        routers = _router_bytes(model, gpu.cpu_moe)
        experts = {rows: sum(map(figure, moved)) - routers for rows, figure in read.items()}
        kv, deep_kv = (_kv_bytes(model, gpu.start, range(depth + 1, depth + generate + 1)) for depth in (0, prompt))
        return cls(prompt, generate, sequences, macs, weights, kv, deep_kv, experts)

    @property
    def is_mixed(self) -> bool:
        return self.weight_bytes[1].cpu > 0

    @property
    def is_mixture(self) -> bool:
        return self.weight_bytes[self.prompt_rows] != self.weight_bytes[1]

    @property
    def prompt_rows(self) -> int:
        return _prompt_rows(self.prompt, self.sequences)

    def step_bytes(self, sequences: int) -> Amount:
        assert sequences in (1, self.sequences)
        weights, kv = self.weight_bytes[sequences], self.kv_bytes
        return Amount(weights.gpu + sequences * kv.gpu, weights.cpu + sequences * kv.cpu)

    @property
    def deep_step_bytes(self) -> Amount:
        weights, kv = self.weight_bytes[1], self.deep_kv_bytes
        return Amount(weights.gpu + kv.gpu, weights.cpu + kv.cpu)

    def copied_step_s(self, sequences: int, hits: float, read: Amount) -> float:
        """Returns the minimum seconds of a decode step with GPU copies of experts. The GPU reads the share `hits` of
        the experts, while the CPU reads all others."""
        step, experts = self.step_bytes(sequences), self.expert_bytes[sequences]
        both = Amount(hits * experts, (1 - hits) * experts)
        return Amount(step.gpu, step.cpu - experts).seconds(read) + max(both.each_s(read))

    def prefill_s(self, rates: Rates) -> float:
        read, times = self.weight_bytes[self.prompt_rows], self.prompt / self.prompt_rows
        read_s = Amount(times * read.gpu, times * read.cpu).each_s(rates.read)
        return sum(map(max, read_s, self.prefill_macs.each_s(rates.int8)))


def _prompt_rows(prompt: int, sequences: int) -> int:
    return min(prompt, stage_limits(sequences, prompt).max_batch_tokens)


def _experts_in_ram(model: Model, layers: Sequence[int]) -> Sequence[LayerCost]:
    program = model.program(0, model.layer_count)
    parts = (experts_of(program, (layer,)) for layer in layers)
    return [layer_cost(model.tensors_for(part), part) for part in parts if part is not None]


def _router_bytes(model: Model, layers: Sequence[int]) -> int:
    mixtures = mixtures_of(model.program(0, model.layer_count))
    return sum(model.file.tensor(step.router).n_bytes for step in mixtures if step.layer in layers)


def _kv_bytes(model: Model, cut: int, lengths: range) -> Amount:
    kv = [0.0, 0.0]
    for step in model.program(0, model.layer_count).kv_layers:
        read = sum(min(length, step.window or length) for length in lengths) / len(lengths)
        kv[int(step.layer < cut)] += step.kv_token_bytes * read
    return Amount(*kv)
