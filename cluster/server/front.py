"""The public side of a cluster: settings of its API, port, certificate and record, and what a user is told of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.front.http.connections import ApiPort, listening
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.server.default_fields import check_defaults
from llamaclust.cluster.server.telemetry.settings import TelemetrySettings
from llamaclust.cluster.state.api_keys import LiveKeys
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.cluster.state.events import ModelUse, Ready, Report
from llamaclust.core.errors import UsageError
from llamaclust.model.loader import Model
from llamaclust.model.pooling import Pooling

if TYPE_CHECKING:
    from llamaclust.cluster.front.http.certificate import ServerCertificate
    from llamaclust.cluster.server.coordinator import Cluster

_MORE_REQUESTS = 64
"""Requests of a model beside those that run and wait: they are read, refused, or their replies are written."""


@dataclass(frozen=True, slots=True)
class Front:
    """The public side of a cluster: its port, its record, its API settings, telemetry, the receiver of its events."""

    port: ApiPort
    record: ClusterRecord
    settings: ApiSettings
    telemetry: TelemetrySettings | None
    report: Report


def api_settings(config: ClusterConfig) -> ApiSettings:
    """UsageError for API keys or defaults that cannot be used."""
    check_defaults(config.api.defaults)
    return ApiSettings(
        listen_host=config.host,
        further_hosts=tuple(host for host, _ in config.addresses[1:]),
        api_keys=() if config.api_keys_file is None else LiveKeys(config.api_keys_file),
        prefix=config.api.prefix,
        is_strict=config.api.strict,
        strict_model=config.api.strict_model,
        max_loaded_models=config.max_loaded_models,
        load_on_demand=config.load_on_demand,
        tags=config.api.tags,
        adapter_folder=_existing(config.api.adapter_folder, "api.adapter_folder"),
        disabled=config.api.disabled,
        allows_pull=config.api.pull,
        slot_folder=_existing(config.api.slot_folder, "api.slot_folder"),
        defaults=config.api.defaults,
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
        resume_s=config.timeouts.resume,
        idle_s=config.timeouts.idle,
        max_requests=(config.max_sequences + config.max_waiting + _MORE_REQUESTS) * len(config.of_each_model()),
    )


def _existing(folder: Path | None, key: str) -> Path | None:
    """UsageError where a folder of the cluster file does not exist."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: the folder of {key} does not exist; make it first")
    return folder


@contextmanager
def open_port(config: ClusterConfig, folder: ClusterDir) -> Iterator[ApiPort]:
    """The API's port with its certificate, taken before anything is started."""
    certificate = _certificate(config, folder)
    with (
        nullcontext() if certificate is None else certificate.watched(),
        listening(config.addresses, certificate) as port,
    ):
        yield port


def _certificate(config: ClusterConfig, folder: ClusterDir) -> ServerCertificate | None:
    """UsageError for files that cannot be used."""
    if config.listen_tls is None:
        return None
    from llamaclust.cluster.front.http.certificate import (
        CertificateFiles,
        ServerCertificate,
        certificate_names,
        keep_self_signed,
    )

    given, own = config.listen_tls, folder.api_pem
    if given.certificate is not None and given.key is not None:
        return ServerCertificate(CertificateFiles(given.certificate, given.key))
    folder.create()
    keep_self_signed(own, certificate_names([host for host, _ in config.addresses], config.allowed_hosts))
    return ServerCertificate(CertificateFiles(own, own))


def cluster_record(config: ClusterConfig, folder: ClusterDir, port: ApiPort) -> ClusterRecord:
    keys = config.api_keys_file
    return ClusterRecord(
        name=config.name,
        pid=os.getpid(),
        api=port.url,
        model=config.of_each_model()[0].model_name,
        api_keys_file=None if keys is None else str(keys),
        launcher=config.launcher,
        api_certificate=None if port.certificate is None else str(folder.api_certificate),
    )


def ready_event(cluster: Cluster, front: Front) -> Ready:
    config, record, certificate = cluster.config, front.record, front.port.certificate
    others = [served.name for served in cluster.models[1:] if served.model.generates]
    is_own = config.listen_tls is not None and config.listen_tls.certificate is None
    return Ready(
        record.name,
        record.api,
        record.model,
        record.api_keys_file,
        fingerprint=None if certificate is None else certificate.fingerprint,
        ca_file=record.api_certificate if is_own else None,
        use=_use(cluster.model),
        others=(*others, *(name for served in cluster.models for name in served.adapters.names)),
        collector=_collector(front.telemetry),
        loads_on_demand=config.load_on_demand,
    )


def _collector(telemetry: TelemetrySettings | None) -> str | None:
    """Scheme, host and port of its URL, which may hold a secret besides."""
    target = None if telemetry is None else telemetry.traces or telemetry.metrics
    if target is None:
        return None
    url = urlsplit(target.url)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


def _use(model: Model) -> ModelUse:
    if model.pooling is Pooling.RANK:
        return ModelUse.RANKS
    return ModelUse.TEXT if model.generates else ModelUse.EMBEDDINGS
