"""Tests of spans of API requests: parents, attributes, and what is not traced."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client import CollectorRegistry

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.server.telemetry.settings import Target, TelemetrySettings
from llamaclust.cluster.server.telemetry.telemetry import open_telemetry
from llamaclust.cluster.server.telemetry.trace_sampler import TraceSampler
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, read_journal
from support.clusters.fakes import FakePipeline
from support.clusters.resumable import KilledJournal
from support.clusters.served import MODEL, make_app, make_service, real_engine, serving, until
from support.hub.otlp_collector import OtlpCollector, otlp_collector, values
from support.several_models.api_models import api_model

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
SECRET = "a secret of the prompt"
KEY = "a-key-of-the-api"


@dataclass
class Traced:
    http: httpx.AsyncClient
    collector: OtlpCollector
    engine: Engine
    pipeline: FakePipeline

    async def spans(self, path: str, body: dict[str, Any], **headers: str) -> list[Span]:
        """Returns the spans of one request, in the order of their starts, parents before their children."""
        begun = len(self.collector.spans)
        reply = await self.http.post(path, json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        await until(lambda: any(span.kind == Span.SPAN_KIND_SERVER for span in self.collector.spans[begun:]))
        return self.collector.spans[begun:]


@asynccontextmanager
async def traced(sampler: TraceSampler = TraceSampler(), **settings: Any) -> AsyncIterator[Traced]:  # noqa: B008
    with otlp_collector() as collector:
        own = TelemetrySettings(
            traces=Target(f"{collector.url}/v1/traces"), metrics=None, sampler=sampler, span_delay_s=0.05
        )
        async with (
            asyncio.timeout(60),
            real_engine() as (engine, pipeline),
            open_telemetry(own, "house", {MODEL: engine}, CollectorRegistry()) as telemetry,
            serving(telemetry.traced(make_app(engine, **settings))) as address,
            httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as http,
        ):
            yield Traced(http, collector, engine, pipeline)


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "ignore_eos": True, **fields}


def one(spans: list[Span], name: str) -> Span:
    [found] = [span for span in spans if span.name.startswith(name)]
    return found


async def test_a_request_continues_its_clients_trace_down_to_every_stage() -> None:
    async with traced() as running:
        spans = await running.spans("/v1/chat/completions", chat(temperature=0.5, top_p=0.9), **TRACEPARENT)
    request, sequence = one(spans, "POST /v1/chat/completions"), one(spans, f"chat {MODEL}")
    assert {(span.trace_id.hex(), span.trace_state) for span in spans} == {(TRACE, "vendor=1")}
    assert request.parent_span_id.hex() == PARENT and sequence.parent_span_id == request.span_id
    assert values(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    phases = {span.name: span for span in spans if span.parent_span_id == sequence.span_id}
    assert {"preparation", "prefill", "decode"} <= phases.keys()
    for phase in (phases["prefill"], phases["decode"]):
        stages = [span for span in spans if span.parent_span_id == phase.span_id]
        assert [span.name for span in stages] == ["stage 0: w0", "stage 1: w1"]
        found = [values(span.attributes) for span in stages]
        assert [(stage["llamaclust.worker.name"], stage["llamaclust.stage.index"]) for stage in found] == [
            ("w0", 0),
            ("w1", 1),
        ]
        assert [(stage["llamaclust.layers.start"], stage["llamaclust.layers.end"]) for stage in found] == [
            (0, 2),
            (2, 4),
        ]
        assert all(stage["llamaclust.compute_seconds"] > 0 for stage in found)
    own = values(sequence.attributes)
    assert own.pop("llamaclust.request.id") and own.pop("gen_ai.response.time_to_first_chunk") > 0
    assert own.pop("gen_ai.usage.input_tokens") > 0
    assert own == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llamaclust",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ["length"],
    }


async def test_spans_lie_within_their_parents() -> None:
    async with traced() as running:
        spans = await running.spans("/v1/completions", {"prompt": "x" * 100, "max_tokens": 12, "n": 2})
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans) and len([span for span in spans if not span.parent_span_id]) == 1
    slack_ns = 2_000_000  # the clock offset is estimated anew for each sequence
    for span in spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if span.parent_span_id:
            parent = by_id[span.parent_span_id]
            assert parent.start_time_unix_nano - slack_ns <= span.start_time_unix_nano, (parent.name, span.name)
            assert span.end_time_unix_nano <= parent.end_time_unix_nano + slack_ns, (parent.name, span.name)
    sequences = [span for span in spans if span.name == f"text_completion {MODEL}"]
    assert len(sequences) == 2 and len({span.trace_id for span in spans}) == 1


async def test_embeddings_and_streams_of_every_api_are_traced() -> None:
    async with traced() as running:
        embedded = await running.spans("/v1/embeddings", {"input": ["one", "two"]})
        found = [values(span.attributes) for span in embedded if span.name == f"embeddings {MODEL}"]
        assert len(found) == 2 and all("gen_ai.request.max_tokens" not in attributes for attributes in found)
        for path, body in (
            ("/v1/chat/completions", chat(stream=True)),
            ("/v1/messages", {**chat(), "stream": True}),
            ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
            ("/api/chat", {"model": MODEL, "messages": chat()["messages"], "options": {"num_predict": 4}}),
        ):
            if path in ("/v1/messages", "/v1/responses"):
                body.pop("ignore_eos", None)
                body["model"] = MODEL
            spans = await running.spans(path, body)
            assert one(spans, f"chat {MODEL}").parent_span_id == one(spans, f"POST {path}").span_id


async def test_no_text_no_key_and_no_name_of_a_reply_is_exported() -> None:
    async with traced(api_keys=(KEY,)) as running:
        access = {"authorization": f"Bearer {KEY}"}
        spans = await running.spans(
            "/v1/chat/completions", chat(stop=["a secret stop"], user="a secret user"), **access
        )
        named = {"x-conversation-id": "a-secret-conversation", "idempotency-key": "a-secret-name", **access}
        spans += await running.spans("/v1/chat/completions", chat(), **named)
        reply = await running.http.post("/v1/responses/resp_0123456789abcdef/cancel", headers=access)
        assert reply.status_code == 404
        await until(lambda: bool(running.collector.named("POST /v1/responses")))
        shown = "".join(str(span) for span in running.collector.spans)
    assert "secret" not in shown and KEY not in shown and "0123456789abcdef" not in shown
    assert "POST /v1/responses/{id}/cancel" in shown


async def test_refused_requests_have_spans_only_with_a_key() -> None:
    async with traced(api_keys=(KEY,)) as running:
        assert (await running.http.post("/v1/completions", json={"prompt": "x"})).status_code == 401
        access = {"authorization": f"Bearer {KEY}"}
        assert (await running.http.get("/health")).status_code == 200
        reply = await running.http.post("/v1/completions", json={"prompt": "x", "n": -1}, headers=access)
        assert reply.status_code == 400
        await until(lambda: bool(running.collector.spans))
    [span] = running.collector.spans
    assert values(span.attributes)["http.response.status_code"] == 400
    assert span.status.code == Status.STATUS_CODE_UNSET


async def test_requests_that_pass_no_key_have_no_spans() -> None:
    """No refusal without a key has a span: its sender could choose the span's text."""
    async with traced(api_keys=(KEY,)) as running:
        for path, headers, status in (
            ("/health", {}, 405),
            ("/live", {"authorization": "Bearer another"}, 405),
            ("/", {}, 405),
            ("/no-such-path", {}, 401),
            ("/v1/completions", {"host": "a b"}, 400),
            ("/v1/completions", {"host": "other.example", "authorization": f"Bearer {KEY}"}, 403),
        ):
            reply = await running.http.post(path, json={}, headers={**TRACEPARENT, **headers})
            assert reply.status_code == status, (path, reply.text)
        await running.spans("/v1/completions", {"prompt": "x", "max_tokens": 1}, authorization=f"Bearer {KEY}")
        requests = [span for span in running.collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert [span.name for span in requests] == ["POST /v1/completions"]


async def test_spans_are_named_by_routes_alone() -> None:
    async with traced(prefix="/behind") as running:
        for path in ("/text-of-a-client", "/health", "/behind/slots/text?action=text", "/responses/text/cancel"):
            assert (await running.http.post(path, json={})).status_code in (400, 404, 405, 501), path
        names = ["POST other", "POST other", "POST /slots/{slot}", "POST /responses/{id}/cancel"]
        await until(lambda: len(running.collector.spans) == len(names))
        shown = "".join(str(span) for span in running.collector.spans)
    assert [span.name for span in running.collector.spans] == names and "text" not in shown


async def test_unsampled_requests_have_no_spans_and_the_same_answers() -> None:
    body = {"prompt": "Hello", "max_tokens": 8, "logprobs": 0, "seed": 1, "return_token_ids": True}
    async with traced(TraceSampler(0.0)) as running:
        untraced = (await running.http.post("/v1/completions", json=body)).json()["choices"]
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert (await running.http.post("/v1/completions", json=body, headers=unsampled)).status_code == 200
        spans = await running.spans("/v1/completions", body, **TRACEPARENT)
        again = (await running.http.post("/v1/completions", json=body, headers=TRACEPARENT)).json()["choices"]
    assert {span.trace_id.hex() for span in [*spans, *running.collector.spans]} == {TRACE}
    parts = ("token_ids", "logprobs", "finish_reason")
    assert [again[0][part] for part in parts] == [untraced[0][part] for part in parts]


async def test_a_cancelled_request_is_traced() -> None:
    async with traced() as running:
        running.pipeline.gate.clear()
        body = {"prompt": "Hello", "max_tokens": 90}
        asking = asyncio.create_task(running.http.post("/v1/completions", json=body))
        await running.pipeline.taken.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: bool(running.collector.named("text_completion")))
        running.pipeline.gate.set()
    [sequence] = running.collector.named("text_completion")
    assert values(sequence.attributes)["gen_ai.response.finish_reasons"] == ["abort"]


async def test_a_restored_request_stays_in_its_trace(tmp_path: Path) -> None:
    """The journal of a killed coordinator has the trace context, which the next coordinator's spans continue."""
    path, body = tmp_path / "journal", {"prompt": "Hello", "max_tokens": 30, "ignore_eos": True, "stream": True}
    headers = {**TRACEPARENT, "tracestate": "vendor=1,b=2", "idempotency-key": "one"}
    async with journalled(path, KilledJournal) as running:
        running.pipeline.gate.clear()
        asking = asyncio.create_task(running.http.post("/v1/completions", json=body, headers=headers))
        await running.pipeline.taken.wait()
        await until(lambda: b"admit" in path.read_bytes())
        asking.cancel()  # the reply is kept, and is not complete at the end
    async with journalled(path, Journal) as running:
        await until(lambda: bool(running.collector.named("text_completion")))
    [sequence] = running.collector.named("text_completion")
    assert sequence.trace_id.hex() == TRACE and sequence.parent_span_id.hex() != PARENT
    assert sequence.trace_state == "vendor=1,b=2"
    assert values(sequence.attributes)["gen_ai.usage.output_tokens"] == 30


@asynccontextmanager
async def journalled(path: Path, kind: type[Journal]) -> AsyncIterator[Traced]:
    settings = ApiSettings()
    with otlp_collector() as collector:
        own = TelemetrySettings(traces=Target(f"{collector.url}/v1/traces"), metrics=None, span_delay_s=0.01)
        async with (
            asyncio.timeout(60),
            real_engine() as (engine, pipeline),
            open_telemetry(own, "house", {MODEL: engine}, CollectorRegistry()) as telemetry,
            aclosing(kind(path, ControlRecord(), settings.resume_s)) as journal,
            aclosing(Replies(settings, journal)) as replies,
        ):
            app = make_app(engine, replies=replies)
            left = await asyncio.to_thread(read_journal, path, Instant.now())
            await replies.restore(left)
            async with (
                serving(telemetry.traced(app)) as address,
                httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as http,
            ):
                yield Traced(http, collector, engine, pipeline)


async def test_each_of_several_models_has_its_own_spans_and_metrics() -> None:
    with otlp_collector() as collector:
        traces, metrics = (Target(f"{collector.url}/v1/{signal}") for signal in ("traces", "metrics"))
        own = TelemetrySettings(traces=traces, metrics=metrics, span_delay_s=0.01, metrics_interval_s=0.02)
        async with asyncio.timeout(60), real_engine() as (first, _), real_engine() as (second, _):
            engines, several = {"x": first, "y": second}, ApiSettings(can_unload=True)
            models = [api_model(make_service(engine, name=name), engine, several) for name, engine in engines.items()]
            async with (
                open_telemetry(own, "house", engines, CollectorRegistry()) as telemetry,
                serving(telemetry.traced(create_app(models))) as address,
                httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as http,
            ):
                reply = await http.post("/completion", json={"model": "y", "prompt": "Hello", "n_predict": 4})
                assert reply.status_code == 200, reply.text
                await until(lambda: bool(collector.named("POST /completion") and collector.metrics))
    assert one(collector.spans, "text_completion").name == "text_completion y"
    running = [metric for metric in collector.metrics if metric.name == "llamaclust_requests_running"]
    served = {values(metric.gauge.data_points[0].attributes)["gen_ai.request.model"] for metric in running}
    assert served == {"x", "y"}
    duration = collector.metric("gen_ai.server.request.duration")
    assert values(duration.histogram.data_points[0].attributes)["gen_ai.request.model"] == "y"
    exports = collector.metric("llamaclust_telemetry_exported").sum.data_points
    assert [values(point.attributes) for point in exports] == [{"signal": "traces"}, {"signal": "metrics"}]


def test_without_telemetry_the_library_is_not_imported() -> None:
    program = (
        "import sys; import llamaclust.cluster.server.serve, llamaclust.cluster.server.telemetry.telemetry;"
        " print([name for name in sys.modules if name.startswith('opentelemetry.proto')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
