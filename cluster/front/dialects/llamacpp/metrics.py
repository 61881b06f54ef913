"""The engine's metrics by llama.cpp's names, for its dashboards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from llamaclust.cluster.engine.engine import Engine


class _Metric(NamedTuple):
    name: str
    kind: str
    text: str
    value: float


def llamacpp_metrics(engines: Mapping[str, Engine]) -> bytes:
    """In Prometheus' text format, by hand: two of the counters have names that its library refuses. `engines`: by
    model, which is a label where there are several."""
    labels = [f'{{model="{_escaped(model)}"}}' if len(engines) > 1 else "" for model in engines]
    written = [(*_counters(engine), *_gauges(engine)) for engine in engines.values()]
    return "".join(_family(metrics, labels) for metrics in zip(*written, strict=True)).encode()


def _family(metrics: Sequence[_Metric], labels: Sequence[str]) -> str:
    """One metric of all models."""
    name, kind, text, _ = metrics[0]
    head = f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\n"
    return head + "".join(
        f"llamacpp:{name}{label} {metric.value}\n" for metric, label in zip(metrics, labels, strict=True)
    )


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _counters(engine: Engine) -> Iterator[_Metric]:
    counts, metrics = engine.counts, engine.metrics
    stages, sums, drafts = metrics.stage_report(), metrics.sums, metrics.drafts
    for name, text, value in (
        ("prompt_tokens_total", "Prompt tokens computed", counts.computed_tokens),
        ("prompt_tokens_cached_total", "Prompt tokens found in the prefix cache", counts.cached_tokens),
        ("prompt_seconds_total", "From start to first token, of ended requests", sums.prompt_s),
        ("tokens_predicted_total", "Tokens generated", metrics.generated_tokens),
        ("tokens_predicted_seconds_total", "From first token to last, of ended requests", sums.answer_s),
        ("n_decode_total", "Microbatches of the first stage since the plan", stages[0].microbatches if stages else 0),
        ("n_tokens_max", "Most tokens of a request, prompt and answer", sums.most_tokens),
        ("spec_decode_num_draft_tokens_total", "Drafted tokens computed", drafts.drafted),
        ("spec_decode_num_accepted_tokens_total", "Drafted tokens that were accepted", drafts.accepted),
        ("spec_decode_num_drafts_total", "Drafts computed", drafts.drafts),
    ):
        yield _Metric(name, "counter", text, value)


def _gauges(engine: Engine) -> Iterator[_Metric]:
    counts, speed = engine.counts, engine.metrics.speed()
    ttft_s, token_s = (speed.ttft_ms or 0) / 1e3, (speed.token_ms or 0) / 1e3
    prompt_rate = (speed.prompt_tokens or 0) / ttft_s if ttft_s else 0
    for name, text, value in (
        ("prompt_tokens_seconds", "Prompt tokens a second before the first token of a request, median", prompt_rate),
        ("predicted_tokens_seconds", "Tokens a second of a request, median", 1 / token_s if token_s else 0),
        ("requests_processing", "Sequences being computed", counts.running),
        ("requests_deferred", "Sequences that wait", counts.waiting),
        ("n_busy_slots_per_decode", "Rows of a microbatch of the first stage, mean", engine.metrics.mean_rows),
    ):
        yield _Metric(name, "gauge", text, value)
