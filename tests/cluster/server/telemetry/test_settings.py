"""Tests where telemetry goes, by keys of the cluster file and then by OpenTelemetry's variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.config.environment import otel_variables
from llamaclust.cluster.config.sections import Telemetry
from llamaclust.cluster.server.telemetry import telemetry
from llamaclust.cluster.server.telemetry.settings import Target, TelemetrySettings
from llamaclust.cluster.server.telemetry.telemetry import resolve_telemetry
from llamaclust.core.errors import UsageError

COLLECTOR = "http://collector:4318"


def resolved(section: Telemetry | None = None, /, **variables: str) -> TelemetrySettings:
    settings = TelemetrySettings.resolve(section or Telemetry(), variables)
    assert settings is not None
    return settings


def targets(section: Telemetry | None = None, /, **variables: str) -> tuple[Target, Target]:
    settings = resolved(section, **variables)
    assert settings.traces is not None and settings.metrics is not None
    return settings.traces, settings.metrics


def config(**values: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": "m.gguf", "workers": [{"name": "a"}], **values})


def test_only_the_cluster_file_switches_it_on() -> None:
    assert config().telemetry is None
    assert TelemetrySettings.resolve(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR}) is None
    assert config(telemetry="otlp").telemetry == config(telemetry={}).telemetry == Telemetry()


def test_addresses_are_those_of_the_file_then_of_the_signal_then_of_all_signals() -> None:
    urls = [target.url for target in targets()]
    assert urls == ["http://localhost:4318/v1/traces", "http://localhost:4318/v1/metrics"]
    both = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"{COLLECTOR}/", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://t/own"}
    assert [target.url for target in targets(**both)] == ["https://t/own", f"{COLLECTOR}/v1/metrics"]
    urls = [target.url for target in targets(Telemetry(endpoint="https://file/otlp"), **both)]
    assert urls == ["https://file/otlp/v1/traces", "https://file/otlp/v1/metrics"]


def test_headers_come_from_variables_or_a_file_and_are_never_shown(tmp_path: Path) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Basic%20abc, x-a=1",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "x-b=2",
    }
    traces, metrics = targets(**variables)
    assert traces.headers == {"authorization": "Basic abc", "x-a": "1"} and metrics.headers == {"x-b": "2"}
    assert "abc" not in repr(traces)
    path = tmp_path / "headers"
    path.write_text("# of the collector\nAuthorization=Bearer secret\n\n")
    path.chmod(0o600)
    traces, _ = targets(Telemetry(headers_file=path), **variables)
    assert traces.headers == {"authorization": "Bearer secret", "x-a": "1"}


@pytest.mark.parametrize(
    ("text", "mode"),
    [("a=1", 0o640), ("secret", 0o600), ("a=\x01secret", 0o600), ("a=é", 0o600), ("a=secret\n" * 10_000, 0o600)],
)
def test_a_bad_headers_file_is_refused_without_its_contents(tmp_path: Path, text: str, mode: int) -> None:
    path = tmp_path / "headers"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(UsageError) as caught:
        resolved(Telemetry(headers_file=path))
    assert str(path) in str(caught.value) and "secret" not in str(caught.value)


def test_a_pipe_is_no_headers_file(tmp_path: Path) -> None:
    path = tmp_path / "headers"
    os.mkfifo(path, 0o600)
    with pytest.raises(UsageError, match=f"telemetry.headers_file: {path}: not a regular file"):
        resolved(Telemetry(headers_file=path))


def test_a_relative_headers_file_is_beside_the_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: smollm2-135m-instruct\nworkers: [{name: a}]\ntelemetry: {headers_file: own}\n")
    section = load_config(file).telemetry
    assert section is not None and section.headers_file == tmp_path / "own"
    with pytest.raises(UsageError, match=r"telemetry.headers_file: .*own: No such file"):
        resolved(section)


def test_the_other_variables_are_obeyed(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_text("x")
    settings = resolved(
        OTEL_EXPORTER_OTLP_TIMEOUT="500",
        OTEL_EXPORTER_OTLP_TRACES_COMPRESSION="none",
        OTEL_EXPORTER_OTLP_CERTIFICATE=str(certificate),
        OTEL_SERVICE_NAME="house",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=a%20b,service.name=x",
        OTEL_BSP_SCHEDULE_DELAY="250",
        OTEL_BSP_MAX_QUEUE_SIZE="7",
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE="3",
        OTEL_METRIC_EXPORT_INTERVAL="1500",
    )
    assert settings.traces is not None and settings.metrics is not None
    assert (settings.traces.timeout_s, settings.traces.is_compressed) == (0.5, False)
    assert (settings.metrics.is_compressed, settings.metrics.certificate) == (True, str(certificate))
    assert settings.resource == {"service.name": "house", "deployment.environment.name": "a b"}
    assert (settings.span_delay_s, settings.max_records, settings.max_spans) == (0.25, 7, 3)
    assert settings.metrics_interval_s == 1.5


@pytest.mark.parametrize(
    ("name", "argument", "ratio", "obeys_parent"),
    [
        ("always_on", "0.5", 1.0, False),
        ("always_off", "", 0.0, False),
        ("traceidratio", "0.25", 0.25, False),
        ("parentbased_traceidratio", "0.25", 0.25, True),
        ("parentbased_always_off", "", 0.0, True),
        ("", "", 1.0, True),
    ],
)
def test_the_sampler_is_that_of_the_variables(name: str, argument: str, ratio: float, obeys_parent: bool) -> None:
    given = otel_variables({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument, "PATH": "/"})
    sampler = resolved(**given).sampler
    assert (sampler.ratio, sampler.obeys_parent) == (ratio, obeys_parent)
    assert resolved(Telemetry(sample_ratio=0.125), **given).sampler.ratio == 0.125


def test_a_protocol_of_each_signal_precedes_the_one_of_both() -> None:
    own = {f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL": "http/protobuf" for signal in ("TRACES", "METRICS")}
    assert len(targets(OTEL_EXPORTER_OTLP_PROTOCOL="grpc", **own)) == 2


def test_signals_can_be_switched_off() -> None:
    assert resolved(OTEL_TRACES_EXPORTER="none").traces is None
    assert resolved(OTEL_METRICS_EXPORTER="none").metrics is None
    assert TelemetrySettings.resolve(Telemetry(), {"OTEL_SDK_DISABLED": "true"}) is None
    both = {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}
    assert TelemetrySettings.resolve(Telemetry(), both) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "secret.key"),
        ("OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE", "secret.pem"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:secret@host"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "secret:4317"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "nan"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/not/there"),
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("OTEL_TRACES_SAMPLER", "xray"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        resolved(**{name: value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "http://user:secret@host", "http://host/?key=secret", "ftp://host"]
)
def test_a_bad_endpoint_of_the_file_is_refused(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        config(telemetry={"endpoint": endpoint})


def test_the_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_telemetry(config()) is None
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    assert resolve_telemetry(config()) is None
    with pytest.raises(UsageError, match=r"^telemetry needs opentelemetry-proto: pip install 'llamaclust\[otel\]'$"):
        resolve_telemetry(config(telemetry="otlp"))
