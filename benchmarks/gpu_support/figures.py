"""Figures of a run on a GPU, and their goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runner.llama import Speed

from gpu_support.work import Rates, Work
from llamaclust.tools.bench.limits import Spread

DECODE_SHARE, MIXED_SHARE, PREFILL_SHARE, TIMES_ONE, RATIO = 0.80, 0.85, 0.35, 6.0, 1.0
"""Goals for decode on a GPU alone, decode with layers or experts in RAM, prefill, eight sequences relative to one, and
the speed relative to llama.cpp or to decode without copies of experts."""
_TOGETHER = 8


@dataclass(frozen=True, slots=True)
class CopiedSteps:
    step_s: float  # Seconds per step.
    hits: int  # Number of times that a step used an expert with a GPU copy.
    misses: int

    @property
    def hit_share(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of a prefill and of decode steps: from the first token on, of several sequences, and after the prompt.
    `copied` has the times of decode steps with GPU copies of experts."""

    rates: Rates
    prefill_s: float
    step_s: float
    many_s: float
    deep_s: float
    theirs: Speed | None = None  # Speed of llama.cpp.
    # Steps with copies of experts, by number of sequences.
    copied: Mapping[int, CopiedSteps] = field(default_factory=dict)

    def steps_s(self, sequences: int) -> float:
        return self.step_s if sequences == 1 else self.many_s


@dataclass(frozen=True, slots=True)
class Figures:
    work: Work
    rounds: Sequence[Round]

    def spread(self, figure: Callable[[Round], float]) -> Spread:
        return Spread.of(map(figure, self.rounds))

    @property
    def decode_share(self) -> Spread:
        """The minimum time to read weights and KV memory, as a share of the time per token."""
        step = self.work.step_bytes(1)
        return self.spread(lambda round_: step.seconds(round_.rates.read) / round_.step_s)

    @property
    def many_share(self) -> Spread:
        step = self.work.step_bytes(self.work.sequences)
        return self.spread(lambda round_: step.seconds(round_.rates.read) / round_.many_s)

    @property
    def prefill_share(self) -> Spread:
        return self.spread(lambda round_: self.work.prefill_s(round_.rates) / round_.prefill_s)

    @property
    def times_one(self) -> Spread:
        return self.spread(lambda round_: self.work.sequences * round_.step_s / round_.many_s)

    def copies_share(self, sequences: int) -> Spread:
        """The minimum time to read a step's bytes with GPU copies of experts, as a share of the step's time."""

        def best_s(round_: Round) -> float:
            return self.work.copied_step_s(sequences, round_.copied[sequences].hit_share, round_.rates.read)

        return self.spread(lambda round_: best_s(round_) / round_.copied[sequences].step_s)

    def copies_gain(self, sequences: int) -> Spread:
        return self.spread(lambda round_: round_.steps_s(sequences) / round_.copied[sequences].step_s)

    @property
    def decode_ratio(self) -> Spread:
        return self.spread(lambda round_: 1 / round_.step_s / _theirs(round_).decode)

    @property
    def prefill_ratio(self) -> Spread:
        return self.spread(lambda round_: self.work.prompt / round_.prefill_s / (_theirs(round_).prefill or 1.0))

    @property
    def is_mixed(self) -> bool:
        return self.work.is_mixed

    @property
    def is_compared(self) -> bool:
        return all(round_.theirs is not None for round_ in self.rounds)

    @property
    def has_copies(self) -> bool:
        return all(round_.copied for round_ in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """Returns all figures. A GB is 10^9 bytes. Each spread has the median, the minimum and the maximum."""
        work, step, deep = self.work, self.work.step_bytes(1), self.work.deep_step_bytes
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
            "decode_after_prompt": {
                "prompt": work.prompt,
                "tok_s": self.spread(lambda round_: 1 / round_.deep_s),
                "token_ms": self.spread(lambda round_: 1e3 * round_.deep_s),
                "best_token_ms": self.spread(lambda round_: 1e3 * deep.seconds(round_.rates.read)),
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
        if self.has_copies:
            found["copies"] = {"decode": self._copies(1), "sequences": self._copies(work.sequences)}
        return _plain(found) | {"wanted": [asdict(target) | {"met": target.is_met} for target in self.wanted()]}

    def _rates(self) -> dict[str, Spread]:
        found = {
            "vram_read_gb_s": self.spread(lambda round_: round_.rates.read.gpu / 1e9),
            "gpu_int8_gmac_s": self.spread(lambda round_: round_.rates.int8.gpu / 1e9),
        }
        if self.is_mixed:
            found["ram_read_gb_s"] = self.spread(lambda round_: round_.rates.read.cpu / 1e9)
            found["processor_int8_gmac_s"] = self.spread(lambda round_: round_.rates.int8.cpu / 1e9)
        return found

    def _copies(self, sequences: int) -> dict[str, Any]:
        steps = [round_.copied[sequences] for round_ in self.rounds]
        return {
            "tok_s": self.spread(lambda round_: sequences / round_.copied[sequences].step_s),
            "hits": sum(step.hits for step in steps),
            "misses": sum(step.misses for step in steps),
            "times_without": self.copies_gain(sequences),
            "share": self.copies_share(sequences),
        }

    def wanted(self) -> list[Wanted]:
        found = self._wanted_of_both() if self.is_mixed else self._wanted_of_gpu()
        if self.has_copies:
            for count, what in ((1, "decode"), (self.work.sequences, f"{self.work.sequences} sequences")):
                found.append(Wanted(f"{what} with copies, times without", self.copies_gain(count).median, RATIO))
        if self.is_compared:
            found.append(Wanted("decode, times llama.cpp", self.decode_ratio.median, RATIO))
            found.append(Wanted("prefill, times llama.cpp", self.prefill_ratio.median, None))
        return found

    def _wanted_of_both(self) -> list[Wanted]:
        found = [Wanted("decode, of the time to read VRAM and RAM", self.decode_share.median, MIXED_SHARE)]
        return [*found, self._wanted_of_sequences(MIXED_SHARE)] if self.work.is_mixture else found

    def _wanted_of_gpu(self) -> list[Wanted]:
        peak = "the peak of 8-bit products" + (" or the bandwidth" if self.work.is_mixture else "")
        return [
            Wanted("decode, of the bandwidth", self.decode_share.median, DECODE_SHARE),
            Wanted(f"prefill, of {peak}", self.prefill_share.median, PREFILL_SHARE),
            self._wanted_of_sequences(DECODE_SHARE),
        ]

    def _wanted_of_sequences(self, decode_share: float) -> Wanted:
        """Returns the figure for several sequences and its goal, which differ between dense models and mixtures of
        experts."""
        count, is_mixture = self.work.sequences, self.work.is_mixture
        least = decode_share * TIMES_ONE / _TOGETHER if is_mixture else TIMES_ONE
        found = self.many_share if is_mixture else self.times_one
        what = "of the time to read their weights" if is_mixture else "times one"
        return Wanted(f"{count} sequences, {what}", found.median, least if count == _TOGETHER else None)


@dataclass(frozen=True, slots=True)
class Wanted:
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
    return {
        name: _plain(value) if isinstance(value, dict) else asdict(value) if isinstance(value, Spread) else value
        for name, value in values.items()
    }
