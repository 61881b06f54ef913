"""Owns an engine's Prometheus metrics, and the stages' times for `GET /cluster`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.engine.throughput import MeasuredSpeed, RecentSums, SpeedMeter
from llamaclust.cluster.scheduler.counts import Counts
from llamaclust.cluster.scheduler.requests import Operation, Timings
from llamaclust.cluster.scheduler.speculation.counts import DraftCounts
from llamaclust.wire.microbatch.messages import Result, StageTiming

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_RECOVERIES = 16
_PREFILL_ROWS = 32
"""Minimum number of tokens of a microbatch that counts as prefill."""
_TTFT = "time_to_first_token_seconds", "Time from a request's arrival to its first token"
_TPOT = "time_per_output_token_seconds", "Mean time per generated token of a request"
_DURATION = "request_duration_seconds", "Time from a request's arrival to its last token"
_TOKENS = "request_tokens", "Number of tokens of a request"
_ROWS = "microbatch_rows", "Number of tokens that a microbatch computes"
_RECOVERY = "recovery_seconds", "Time without a pipeline after a loss"
_BUCKETS: dict[tuple[str, str], Sequence[float]] = {
    _TTFT: (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 300),
    _TPOT: (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
    _DURATION: (*(0.01 * (1 << power) for power in range(14)), 300, 600),
    _TOKENS: tuple(4**power for power in range(11)),
    _ROWS: tuple(1 << power for power in range(13)),
    _RECOVERY: (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
}
"""Histogram bounds by name and help text. They are OpenTelemetry's bounds, with some lower and higher bounds added."""
_LABELS: dict[tuple[str, str], Sequence[str]] = {
    _TTFT: ("operation",),
    _TPOT: ("operation",),
    _DURATION: ("operation", "finish_reason"),
    _TOKENS: ("operation", "type"),
}


@dataclass(frozen=True, slots=True)
class StageReport:
    """Figures of one stage. Means are over all its microbatches. Utilization and token rate are over the last 10 s."""

    worker: str
    layers: tuple[float, float]  # Half-open range of layers. A fraction means a part of a layer.
    microbatches: int
    rows: int
    compute_ms: float  # Mean time of a microbatch.
    queue_ms: float
    wire_ms: float
    decode_ms: float | None  # Mean time of microbatches with one token. None if there were none.
    prefill_ms: float | None  # Mean time per token of prefill microbatches. None if there were none.
    utilization: float  # Fraction of the time in which the stage computed.
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class EndedRequest:
    reason: str  # A finish reason, or "error".
    timings: Timings
    seconds: float  # Seconds since the request was submitted.
    operation: Operation = Operation.TEXT_COMPLETION
    is_restored: bool = False  # True if an earlier coordinator had computed the first tokens.


@dataclass(slots=True)
class RequestSums:
    prompt_s: float = 0.0  # Sum over all requests of the time from start to first token.
    answer_s: float = 0.0  # Sum over all requests of the time from first to last token.
    most_tokens: int = 0  # Largest number of prompt and answer tokens of one request.

    def add(self, timings: Timings) -> None:
        self.prompt_s += max(0.0, timings.ttft_ms - timings.queue_ms) / 1e3
        self.answer_s += (timings.generated_tokens - 1) / timings.decode_tok_s if timings.decode_tok_s else 0.0
        self.most_tokens = max(self.most_tokens, timings.prompt_tokens + timings.generated_tokens)


class _Mean:
    def __init__(self) -> None:
        self._ns = self._count = 0

    def add(self, ns: int, count: int) -> None:
        self._ns += ns
        self._count += count

    @property
    def ms(self) -> float | None:
        return self._ns / 1e6 / self._count if self._count else None


class _StageMeter:
    def __init__(self, stage: StageInfo, since_ns: int) -> None:
        self.stage = stage
        self._since_ns = since_ns
        self.microbatches = self.rows = 0
        self.compute_ns = self.queue_ns = self.wire_ns = 0
        self._decode = _Mean()
        self._prefill = _Mean()
        self._recent = RecentSums()

    def add(self, timing: StageTiming, now_ns: int) -> None:
        if timing.rows == 1:
            self._decode.add(timing.compute_ns, 1)
        elif timing.rows >= _PREFILL_ROWS:
            self._prefill.add(timing.compute_ns, timing.rows)
        self.microbatches += 1
        self.rows += timing.rows
        self.compute_ns += timing.compute_ns
        self.queue_ns += timing.queue_ns
        self.wire_ns += timing.wire_ns
        self._recent.add(now_ns, timing.compute_ns, timing.rows)

    def report(self, now_ns: int) -> StageReport:
        each = 1e6 * max(self.microbatches, 1)
        utilization, tokens_per_s = self._recent.rates(now_ns, self._since_ns)
        return StageReport(
            worker=self.stage.worker,
            layers=self.stage.layers,
            microbatches=self.microbatches,
            rows=self.rows,
            compute_ms=self.compute_ns / each,
            queue_ms=self.queue_ns / each,
            wire_ms=self.wire_ns / each,
            decode_ms=self._decode.ms,
            prefill_ms=self._prefill.ms,
            utilization=utilization,
            tokens_per_s=tokens_per_s,
        )


class Metrics(Collector):
    def __init__(self, stages: Sequence[StageInfo], counts: Callable[[], Counts], clock_ns: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.cluster = CollectorRegistry()  # Metrics of the whole cluster, which all models share.
        self._clock_ns = clock_ns
        self.recovery_s: deque[float] = deque(maxlen=_RECOVERIES)  # Seconds that each of the last recoveries took.
        self._meters = [_StageMeter(stage, clock_ns()) for stage in stages]
        self._speed = SpeedMeter(clock_ns())
        self.sums = RequestSums()
        self.drafts = DraftCounts()
        self._finished = Counter(
            "llamaclust_requests", "Requests that ended, by reason", ["finish_reason"], registry=self.registry
        )
        self._prompt = Counter("llamaclust_prompt_tokens", "Prompt tokens of ended requests", registry=self.registry)
        self._generated = Counter("llamaclust_generated_tokens", "Generated tokens", registry=self.registry)
        self._restored = Counter(
            "llamaclust_kv_disk_tokens", "Prompt tokens whose KV memory was read from disk", registry=self.registry
        )
        self._histograms = {
            (name, what): Histogram(
                f"llamaclust_{name}", what, _LABELS.get((name, what), ()), buckets=buckets, registry=self.registry
            )
            for (name, what), buckets in _BUCKETS.items()
        }
        self._counts = counts
        self.registry.register(self)

    def restart(self, stages: Sequence[StageInfo]) -> None:
        self._meters = [_StageMeter(stage, self._clock_ns()) for stage in stages]

    def recovered(self, seconds: float) -> None:
        self._histograms[_RECOVERY].observe(seconds)
        self.recovery_s.append(seconds)

    def restored(self, tokens: int) -> None:
        self._restored.inc(tokens)

    def sampled(self, tokens: int, now_ns: int) -> None:
        if tokens:
            self._generated.inc(tokens)
            self._speed.sampled(tokens, now_ns)

    def drafted(self, drafts: DraftCounts, now_ns: int) -> None:
        if drafts.drafts:
            self.drafts += drafts
            self._speed.drafted(drafts, now_ns)

    def completed(self, result: Result, now_ns: int) -> None:
        for meter, timing in zip(self._meters, result.timings, strict=False):
            meter.add(timing, now_ns)
        if result.timings:
            self._histograms[_ROWS].observe(result.timings[0].rows)

    def finished(self, request: EndedRequest) -> None:
        timings, operation = request.timings, request.operation
        self._finished.labels(request.reason).inc()
        self._prompt.inc(timings.prompt_tokens)
        if request.is_restored:
            return
        self._histograms[_DURATION].labels(operation, request.reason).observe(request.seconds)
        self._histograms[_TOKENS].labels(operation, "input").observe(timings.prompt_tokens)
        self._histograms[_TOKENS].labels(operation, "output").observe(timings.generated_tokens)
        self._speed.finished(timings)
        self.sums.add(timings)
        if timings.generated_tokens:
            self._histograms[_TTFT].labels(operation).observe(timings.ttft_ms / 1e3)
        if timings.decode_tok_s > 0:
            self._histograms[_TPOT].labels(operation).observe(1 / timings.decode_tok_s)

    @property
    def generated_tokens(self) -> int:
        return int(next(iter(self._generated.collect())).samples[0].value)

    @property
    def mean_rows(self) -> float:
        meters = self._meters[:1]
        return sum(meter.rows for meter in meters) / max(1, sum(meter.microbatches for meter in meters))

    def stage_report(self) -> tuple[StageReport, ...]:
        now_ns = self._clock_ns()
        return tuple(meter.report(now_ns) for meter in self._meters)

    def speed(self) -> MeasuredSpeed:
        return self._speed.measured(self._clock_ns())

    def render(self) -> bytes:
        return generate_latest(self.registry) + generate_latest(self.cluster)

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        yield GaugeMetricFamily("llamaclust_requests_running", "Sequences being computed", counts.running)
        yield GaugeMetricFamily("llamaclust_requests_waiting", "Sequences waiting to be computed", counts.waiting)
        yield GaugeMetricFamily("llamaclust_microbatches_in_flight", "Microbatches in the pipeline", counts.in_flight)
        blocks = GaugeMetricFamily("llamaclust_kv_blocks", "KV blocks by state", labels=["state"])
        blocks.add_metric(["used"], counts.kv_blocks_held)
        blocks.add_metric(["free"], counts.kv_blocks - counts.kv_blocks_held)
        yield blocks
        yield CounterMetricFamily(
            "llamaclust_preemptions", "Sequences preempted for lack of KV memory", counts.preemptions
        )
        again = "Sequences computed again after an invalid result"
        yield CounterMetricFamily("llamaclust_retries", again, counts.retries)
        cached = "Prompt tokens found in the prefix cache"
        yield CounterMetricFamily("llamaclust_prefix_cache_hit_tokens", cached, counts.cached_tokens)
        computed = "Prompt tokens computed"
        yield CounterMetricFamily("llamaclust_prefill_tokens", computed, counts.computed_tokens)
        for name, what, value in (
            ("drafts", "Drafts computed", self.drafts.drafts),
            ("draft_tokens", "Drafted tokens computed", self.drafts.drafted),
            ("accepted_tokens", "Drafted tokens that are in answers", self.drafts.accepted),
        ):
            yield CounterMetricFamily(f"llamaclust_spec_decode_{name}", what, value)
        for place, (name, what) in enumerate(
            (("draft", "Drafted tokens computed"), ("accepted", "Drafted tokens in answers"))
        ):
            text = f"{what}, by kind of draft"
            family = CounterMetricFamily(f"llamaclust_spec_decode_{name}_tokens_by_kind", text, labels=["kind"])
            for kind, counts_of_kind in sorted(self.drafts.kinds.items()):
                family.add_metric([kind], counts_of_kind[place])
            yield family
        yield from self._stages()

    def _stages(self) -> Iterator[Metric]:
        labels = ["stage", "worker"]
        named = [([str(index), meter.stage.worker], meter) for index, meter in enumerate(self._meters)]
        for name, what in (("compute", "computing"), ("queue", "waiting for the stage"), ("wire", "sending")):
            seconds = CounterMetricFamily(f"llamaclust_stage_{name}_seconds", f"Time spent {what}", labels=labels)
            for values, meter in named:
                seconds.add_metric(values, getattr(meter, f"{name}_ns") / 1e9)
            yield seconds
        what = "Share of the last 10 s spent computing"
        busy = GaugeMetricFamily("llamaclust_stage_utilization_ratio", what, labels=labels)
        for (values, _), report in zip(named, self.stage_report(), strict=True):
            busy.add_metric(values, report.utilization)
        yield busy
