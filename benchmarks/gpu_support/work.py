"""Figures of a model on a GPU, or on a GPU and the processor beside it: what their memories and multipliers would take
at best, beside what was measured. Only arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Self

from compare import Speed

from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.tools.bench.limits import Spread

DECODE_SHARE, MIXED_SHARE, PREFILL_SHARE, TIMES_ONE, RATIO = 0.80, 0.85, 0.35, 6.0, 1.0
"""What is wanted: decode on a GPU alone, and with layers in RAM; prefill; eight sequences beside one; llama.cpp."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes, or multiply-accumulates: on the GPU and on the processor. Where they are rates, they are a second's."""

    gpu: float
    cpu: float

    def seconds(self, rates: Amount) -> float:
        """At best: one device behind the other."""
        return self.gpu / rates.gpu + (self.cpu / rates.cpu if self.cpu else 0.0)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the devices can do at best in a second; 0 for a processor that has no layers."""

    read: Amount  # bytes
    int8: Amount  # multiply-accumulates

    def best(self, other: Rates) -> Rates:
        """Each the greater one: other work on the machine can only make a rate look smaller than it is."""
        read, int8 = (
            Amount(*map(max, astuple(mine), astuple(its)))
            for mine, its in ((self.read, other.read), (self.int8, other.int8))
        )
        return Rates(read, int8)


@dataclass(frozen=True, slots=True)
class Work:
    """What is done where layers [cut, ...) and the head are on the GPU. Weights count as the file holds them."""

    prompt: int
    generate: int
    sequences: int
    prefill_macs: Amount
    weight_bytes: Amount  # read by a step of one sequence
    many_weight_bytes: Amount  # of all sequences: of a mixture, they use more experts than one does
    kv_bytes: Amount  # read by a step for each sequence, in the mean

    @classmethod
    def of(cls, model: Model, cut: int, prompt: int, generate: int, sequences: int) -> Self:
        costs, ends = model.costs(KvType.F16), (cut, model.layer_count)
        lengths = range(1, generate + 1)
        macs, weights = [float(costs.head_macs), 0.0], [float(costs.head_file_bytes), 0.0]
        many, kv = weights.copy(), [0.0, 0.0]
        for layer, cost in enumerate(costs.layers):
            place = int(layer < cut)
            macs[place] += prompt * cost.macs_per_token
            weights[place] += cost.used_file_bytes
            many[place] += cost.used_file_bytes + cost.touched_bytes(sequences) - cost.touched_bytes(1)
        for step in model.program(0, ends[1]).kv_layers:
            read = sum(min(length, step.window or length) for length in lengths) / generate
            kv[int(step.layer < cut)] += step.kv_token_bytes * read
        return cls(prompt, generate, sequences, Amount(*macs), Amount(*weights), Amount(*many), Amount(*kv))

    @property
    def is_mixture(self) -> bool:
        return self.many_weight_bytes != self.weight_bytes

    def step_bytes(self, sequences: int) -> Amount:
        """Read by a decode step of one sequence, or of all."""
        assert sequences in (1, self.sequences)
        weights, kv = self.weight_bytes if sequences == 1 else self.many_weight_bytes, self.kv_bytes
        return Amount(weights.gpu + sequences * kv.gpu, weights.cpu + sequences * kv.cpu)


@dataclass(frozen=True, slots=True)
class Round:
    """One of each, one right after the other, in seconds: a prefill, a decode step of one sequence and of several."""

    rates: Rates
    prefill_s: float
    step_s: float
    many_s: float
    theirs: Speed | None = None  # llama.cpp's


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all rounds."""

    work: Work
    rounds: Sequence[Round]

    def spread(self, figure: Callable[[Round], float]) -> Spread:
        return Spread.of(map(figure, self.rounds))

    @property
    def decode_share(self) -> Spread:
        """The time in which the memories can be read, of the time that a token took."""
        step = self.work.step_bytes(1)
        return self.spread(lambda round_: step.seconds(round_.rates.read) / round_.step_s)

    @property
    def many_share(self) -> Spread:
        step = self.work.step_bytes(self.work.sequences)
        return self.spread(lambda round_: step.seconds(round_.rates.read) / round_.many_s)

    @property
    def prefill_share(self) -> Spread:
        return self.spread(lambda round_: self.work.prefill_macs.seconds(round_.rates.int8) / round_.prefill_s)

    @property
    def times_one(self) -> Spread:
        """Tokens a second of all sequences, of those of one."""
        return self.spread(lambda round_: self.work.sequences * round_.step_s / round_.many_s)

    @property
    def decode_ratio(self) -> Spread:
        """Above 1 where llama.cpp is slower."""
        return self.spread(lambda round_: 1 / round_.step_s / _theirs(round_).decode)

    @property
    def prefill_ratio(self) -> Spread:
        return self.spread(lambda round_: self.work.prompt / round_.prefill_s / (_theirs(round_).prefill or 1.0))

    @property
    def is_mixed(self) -> bool:
        return self.work.weight_bytes.cpu > 0

    @property
    def is_compared(self) -> bool:
        return all(round_.theirs is not None for round_ in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """GB are 10^9 bytes; spreads are median, least and most."""
        work, step = self.work, self.work.step_bytes(1)
        found: dict[str, Any] = {
            "rates": self._rates(),
            "decode": {
                "tok_s": self.spread(lambda round_: 1 / round_.step_s),
                "token_ms": self.spread(lambda round_: 1e3 * round_.step_s),
                "best_token_ms": self.spread(lambda round_: 1e3 * step.seconds(round_.rates.read)),
                "vram_bytes": step.gpu,
                "ram_bytes": step.cpu,
                "share": self.decode_share,
            },
            "prefill": {
                "tok_s": self.spread(lambda round_: work.prompt / round_.prefill_s),
                "gpu_gmac": work.prefill_macs.gpu / 1e9,
                "processor_gmac": work.prefill_macs.cpu / 1e9,
                "share": self.prefill_share,
            },
            "sequences": {
                "count": work.sequences,
                "tok_s": self.spread(lambda round_: work.sequences / round_.many_s),
                "times_one": self.times_one,
                "share": self.many_share,
            },
        }
        if self.is_compared:
            found["llama_cpp"] = {
                "decode_tok_s": self.spread(lambda round_: _theirs(round_).decode),
                "prefill_tok_s": self.spread(lambda round_: _theirs(round_).prefill or 0.0),
                "decode_ratio": self.decode_ratio,
                "prefill_ratio": self.prefill_ratio,
            }
        return _plain(found) | {"wanted": [asdict(target) | {"met": target.is_met} for target in self.wanted()]}

    def _rates(self) -> dict[str, Spread]:
        """Of the processor only where it has layers."""
        found = {
            "vram_read_gb_s": self.spread(lambda round_: round_.rates.read.gpu / 1e9),
            "gpu_int8_gmac_s": self.spread(lambda round_: round_.rates.int8.gpu / 1e9),
        }
        if self.is_mixed:
            found["ram_read_gb_s"] = self.spread(lambda round_: round_.rates.read.cpu / 1e9)
            found["processor_int8_gmac_s"] = self.spread(lambda round_: round_.rates.int8.cpu / 1e9)
        return found

    def wanted(self) -> list[Wanted]:
        """Medians beside what is wanted of them: of mixtures, decode alone."""
        count, is_dense = self.work.sequences, not self.work.is_mixture
        if self.is_mixed:
            return [Wanted("decode, of the time to read VRAM and RAM", self.decode_share.median, MIXED_SHARE)]
        found = [
            Wanted("decode, of the bandwidth", self.decode_share.median, DECODE_SHARE),
            Wanted(
                "prefill, of the peak of 8-bit products", self.prefill_share.median, PREFILL_SHARE if is_dense else None
            ),
            Wanted(
                f"{count} sequences, times one", self.times_one.median, TIMES_ONE if count == 8 and is_dense else None
            ),
        ]
        if self.is_compared:
            found.append(Wanted("decode, times llama.cpp", self.decode_ratio.median, RATIO))
            found.append(Wanted("prefill, times llama.cpp", self.prefill_ratio.median, None))
        return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure, and the least that it shall be, if anything."""

    what: str
    found: float
    least: float | None

    @property
    def is_met(self) -> bool | None:
        return None if self.least is None else self.found >= self.least

    def __str__(self) -> str:
        least = "" if self.least is None else f" ({self.least:.2f} wanted{'' if self.is_met else ': short'})"
        return f"{self.what}: {self.found:.2f}{least}"


def _theirs(round_: Round) -> Speed:
    assert round_.theirs is not None
    return round_.theirs


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Spreads as JSON has them."""
    return {
        name: _plain(value) if isinstance(value, dict) else asdict(value) if isinstance(value, Spread) else value
        for name, value in values.items()
    }
