"""The engine's metrics by llama.cpp's names, for its dashboards; those without a counterpart are left out."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llamaclust.cluster.engine.engine import Engine


class LlamaCppMetrics(Collector):
    """Read at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counts, metrics = self._engine.counts, self._engine.metrics
        speed, stages = metrics.speed(), metrics.stage_report()
        ttft_s, token_s = (speed.ttft_ms or 0) / 1e3, (speed.token_ms or 0) / 1e3
        counters: dict[str, tuple[str, float]] = {
            "prompt_tokens": ("Prompt tokens computed", counts.computed_tokens),
            "prompt_tokens_cached": ("Prompt tokens found in the prefix cache", counts.cached_tokens),
            "tokens_predicted": ("Tokens generated", metrics.generated_tokens),
            "n_decode": ("Microbatches of the first stage since the plan", stages[0].microbatches if stages else 0),
        }
        gauges: dict[str, tuple[str, float]] = {
            "prompt_tokens_seconds": (
                "Prompt tokens a second before the first token of a request, median",
                (speed.prompt_tokens or 0) / ttft_s if ttft_s else 0,
            ),
            "predicted_tokens_seconds": ("Tokens a second of a request, median", 1 / token_s if token_s else 0),
            "requests_processing": ("Sequences being computed", counts.running),
            "requests_deferred": ("Sequences that wait", counts.waiting),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"llamacpp:{name}", text, value)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"llamacpp:{name}", text, value)
