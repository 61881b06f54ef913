"""Tests /metrics: Prometheus can read each line, names and units follow its conventions, and figures are right."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.metrics import EndedRequest, Metrics
from llamaclust.cluster.engine.model_metrics import render_all
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.counts import Counts
from llamaclust.cluster.scheduler.requests import GenerationRequest, Operation, Timings
from llamaclust.cluster.server.telemetry.exporter import ExportCounts
from llamaclust.cluster.server.worker_metrics import WorkerMetrics
from llamaclust.wire.control.groups import GroupCounters, GroupMember, GroupOrder
from llamaclust.wire.control.messages import Heartbeat, Loaded, Register, StageProgress
from llamaclust.wire.microbatch.messages import Result, StageTiming
from llamaclust.wire.security.credentials import Insecure
from support.clusters.fakes import FakePipeline
from support.clusters.served import SETTINGS
from support.paths import ROOT
from support.wire.control_messages import LOAD

MODEL_ID = "1a"
CHART = ROOT / "deploy/helm/llamaclust"
REGISTER = Register("a", 7, "host", "unix:/run/a.sock", "cpu", 2, "avx2", 1 << 35, 1 << 34, "a chip, 2 cores")
BEAT = Heartbeat(0.25, 10, 20, 30, 40, 5000, 6000)
UNITS = ("bytes", "seconds", "ratio", "tokens", "requests", "blocks", "rows", "microbatches")
OPERATIONS = ("chat", "text_completion")
MS = 1_000_000


def handle(name: str, beat: Heartbeat | None = BEAT) -> WorkerHandle:
    async def say(message: object) -> None:
        raise AssertionError

    worker = WorkerHandle(replace(REGISTER, name=name), say, lambda: "", Insecure())
    worker.heartbeat = beat
    return worker


def whole() -> tuple[Metrics, dict[str, WorkerHandle]]:
    """Returns all metrics that a cluster of two workers has, and the workers."""
    counts = Counts(*[1] * len(Counts.__dataclass_fields__))
    workers = {"a": handle("a"), "b": handle("b", None)}
    metrics = Metrics([StageInfo("a", 0, 2), StageInfo("b", 2, 4)], lambda: counts, lambda: 1)
    metrics.cluster.register(WorkerMetrics(lambda: workers, lambda: {MODEL_ID: "m"}))
    ExportCounts(metrics.cluster)
    metrics.recovered(0.5)
    timings = Timings(1.0, 20.0, 100.0, 50.0, prompt_tokens=8, cached_tokens=0, generated_tokens=4)
    metrics.finished(EndedRequest("stop", timings, 0.1, Operation.CHAT))
    metrics.completed(Result(1, 0, timings=(StageTiming(1, 2, 3, 4),) * 2), 2)
    return metrics, workers


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    samples = [sample for family in families(text).values() for sample in family.samples]
    [found] = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
    return float(found)


@pytest.fixture(scope="module")
def text() -> str:
    return whole()[0].render().decode()


def test_every_line_can_be_read(text: str) -> None:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    samples = [sample for family in families(text).values() for sample in family.samples]
    assert len(samples) == len(lines) > 80
    written = [(sample.name, *sorted(sample.labels.items())) for sample in samples]
    assert len(set(written)) == len(written)
    assert all(re.fullmatch(r'[a-z_]+(\{([a-z_]+="[^"]*",?)+\})? \S+', line) for line in lines)


def test_names_are_as_prometheus_wants_them(text: str) -> None:
    """Checks https://prometheus.io/docs/practices/naming/: a prefix, base units in the plural, counters in _total."""
    for name, family in families(text).items():
        assert re.fullmatch(r"llamaclust(_[a-z]+)+", name), name
        assert family.documentation and not family.documentation.endswith("."), name
        assert family.type in ("counter", "gauge", "histogram"), name
        assert not re.search(r"_(ms|ns|mib|kb|percent|milliseconds)(_|$)", name), name
        assert not name.endswith(("_total", "_count", "_sum", "_bucket")), name
        if family.type == "counter":
            kinds = {sample.name.removeprefix(name) for sample in family.samples}
            assert kinds <= {"_total", "_created"}, name
        if family.type == "histogram":
            assert name.endswith(UNITS), name
    ratios = [
        sample.value for name, family in families(text).items() if name.endswith("_ratio") for sample in family.samples
    ]
    assert ratios and all(0 <= ratio <= 1 for ratio in ratios)


def test_the_api_page_lists_every_metric_and_no_other(text: str) -> None:
    page = (ROOT / "docs/api.md").read_text()
    table = page.partition("## Metrics\n")[2].partition("\n## ")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    written = {
        name.removeprefix("llamaclust_") + "_total" * (family.type == "counter")
        for name, family in families(text).items()
        if not name.endswith("_created")
    }
    assert listed == written


def test_workers_say_what_went_between_them(text: str) -> None:
    assert value(text, "llamaclust_worker_received_bytes_total", worker="a") == 5000
    assert value(text, "llamaclust_worker_sent_bytes_total", worker="a") == 6000
    assert value(text, "llamaclust_worker_busy_ratio", worker="a") == 0.25
    assert value(text, "llamaclust_worker_resident_memory_bytes", worker="a") == 30
    assert value(text, "llamaclust_worker_up", worker="b") == 1  # b has sent no heartbeat yet
    assert 'llamaclust_worker_sent_bytes_total{worker="b"}' not in text
    assert (
        value(text, "llamaclust_recovery_seconds_count") == 1 and value(text, "llamaclust_recovery_seconds_sum") == 0.5
    )


def test_members_of_groups_say_whom_they_wait_for() -> None:
    metrics, workers = whole()
    hold(workers["a"], workers["b"])
    text, labels = metrics.render().decode(), {"worker": "b", "model": "m"}
    assert value(text, "llamaclust_group_gathers_total", **labels) == 9
    assert value(text, "llamaclust_group_sent_bytes_total", **labels) == 70
    assert value(text, "llamaclust_group_received_bytes_total", **labels) == 80
    waits = [value(text, "llamaclust_group_wait_seconds_total", **labels, member=member) for member in "ab"]
    assert waits == [0.5, 0.0]
    assert 'group_gathers_total{model="m",worker="a"}' not in text, "a worker of before says nothing of gathers"


def hold(first: WorkerHandle, second: WorkerHandle) -> None:
    """Makes both workers hold a stage as a group; the second one counts gathers."""
    members = GroupMember("a", "unix:/run/a.l", 2), GroupMember("b", "unix:/run/b.l")
    for member, (worker, counters) in enumerate(((first, None), (second, GroupCounters(9, 0.5, (0.5, 0.0), 70, 80)))):
        order = replace(LOAD, epoch=5, model_id=MODEL_ID, group=GroupOrder(bytes(16), members, member))
        worker.stages[5] = order, Loaded(5, 1, 1, 1)
        worker.heartbeat = replace(BEAT, stages=(StageProgress(5, 3, group=counters),))


def test_layers_with_divided_experts_count_by_their_shards() -> None:
    metrics, workers = whole()
    order = replace(LOAD, start=0, end=9, devices=(), limits=replace(LOAD.limits, expert_shards=2))
    workers["a"].stages[5] = order, Loaded(5, 1, 1, 1)
    assert value(metrics.render().decode(), "llamaclust_worker_layers", worker="a", device="cpu") == 4.5


def test_a_lost_worker_is_down_and_has_no_other_metrics() -> None:
    metrics, workers = whole()
    workers["a"].lose("killed")
    text = metrics.render().decode()
    assert value(text, "llamaclust_worker_up", worker="a") == 0
    assert "llamaclust_worker_sent_bytes_total{" not in text


def test_metrics_of_several_models_have_the_model_as_a_label() -> None:
    metrics = {model: whole()[0] for model in ("a", "b-2")}
    metrics["a"].cluster = metrics["b-2"].cluster
    metrics["a"].sampled(3, 1)
    text = render_all(metrics).decode()
    test_every_line_can_be_read(text)
    assert value(text, "llamaclust_generated_tokens_total", model="a") == 3
    assert value(text, "llamaclust_generated_tokens_total", model="b-2") == 0
    assert value(text, "llamaclust_stage_compute_seconds_total", model="a", stage="0", worker="a") > 0
    assert value(text, "llamaclust_worker_up", worker="a") == 1
    assert text.count("# TYPE llamaclust_requests_total ") == text.count("# TYPE llamaclust_worker_up ") == 1
    assert value(render_all({"a": metrics["a"]}).decode(), "llamaclust_worker_up", worker="a") == 1


def test_dashboard_and_monitor_use_existing_metrics() -> None:
    """Checks variables too; labels are those of metrics of several models, or those that Prometheus adds."""
    text = render_all({"a": whole()[0]}).decode()
    board = (CHART / "files/dashboard.json").read_text()
    panels = json.loads(board)["panels"]
    known = families(text)
    samples = {sample.name: set(sample.labels) for family in known.values() for sample in family.samples}
    labels = {
        name: {key for sample in family.samples for key in sample.labels} for name, family in known.items()
    } | samples
    asked = set(re.findall(r"llamaclust_\w+", board))
    assert len(asked) > 16 and asked <= labels.keys(), asked - labels.keys()
    for panel in panels:
        for target in panel["targets"]:
            for name, by in re.findall(r"(llamaclust_\w+)\{([^}]*)\}", target["expr"]):
                used = set(re.findall(r"(\w+)=", by))
                assert used <= labels[name] | {"namespace", "job"}, target["expr"]
            for shown in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
                assert any(shown in labels[name] for name in re.findall(r"llamaclust_\w+", target["expr"])), target
    monitor = (CHART / "templates/monitoring.yaml").read_text()
    assert "path: /metrics" in monitor


async def test_measured_speed_is_of_the_last_requests() -> None:
    async with Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS) as engine:
        assert engine.metrics.speed().token_ms is None and engine.metrics.speed().requests == 0
        streams = [engine.submit(GenerationRequest(str(i), tuple(range(20 + i)), max_new_tokens=8)) for i in range(3)]
        await asyncio.gather(*(drained(stream) for stream in streams))
        speed = engine.metrics.speed()
    assert speed.requests == 3 and speed.tokens_per_s > 0
    assert speed.token_ms is not None and speed.token_ms > 0
    assert speed.ttft_ms is not None and speed.ttft_ms > 0
    assert speed.prompt_tokens is not None and 0 < speed.prompt_tokens <= 22


async def drained(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


def test_stages_tell_decode_from_prefill() -> None:
    """Checks the times that plans predict: of a microbatch of one row, and of one row of many."""
    counts = Counts(*[0] * len(Counts.__dataclass_fields__))
    metrics = Metrics([StageInfo("a", 0, 2)], lambda: counts, lambda: 1)
    assert metrics.stage_report()[0].decode_ms is None is metrics.stage_report()[0].prefill_ms
    for number, (rows, ms) in enumerate(((64, 128), (1, 4), (1, 6), (8, 100))):
        metrics.completed(Result(1, number, timings=(StageTiming(0, ms * MS, 0, rows),)), number)
    [report] = metrics.stage_report()
    assert (report.decode_ms, report.prefill_ms) == (5.0, 2.0)


def test_measured_first_token_is_that_of_one_request_and_not_of_a_restored_one() -> None:
    metrics, _ = whole()
    for ttft_ms, prompt_tokens in ((10.0, 900), (500.0, 7), (30.0, 20)):
        metrics.finished(EndedRequest("stop", Timings(0.0, ttft_ms, 1.0, 1.0, prompt_tokens, 0, 4), 1.0))
    metrics.finished(EndedRequest("stop", Timings(0.0, 1.0, 1.0, 1e6, 5, 0, 400), 1.0, is_restored=True))
    speed = metrics.speed()
    assert (speed.ttft_ms, speed.prompt_tokens, speed.requests) == (20.0, 8, 4), "the first one is `whole`'s"
    metrics.finished(EndedRequest("stop", Timings(0.0, 40.0, 1.0, 1.0, 64, 0, 4), 1.0))
    assert (metrics.speed().ttft_ms, metrics.speed().prompt_tokens) == (30.0, 20)
    text = metrics.render().decode()
    assert value(text, "llamaclust_requests_total", finish_reason="stop") == 6
    first, others = (value(text, "llamaclust_time_to_first_token_seconds_count", operation=name) for name in OPERATIONS)
    assert (first, others) == (1, 4)
    completions = {"operation": "text_completion"}
    assert value(text, "llamaclust_request_duration_seconds_sum", finish_reason="stop", **completions) == 4.0
    assert value(text, "llamaclust_request_tokens_sum", type="input", **completions) == 900 + 7 + 20 + 64
    assert value(text, "llamaclust_request_tokens_sum", type="output", **completions) == 4 * 4
