"""Prepares a cluster's HTTP API: its settings, port, certificate and record, and the models that it serves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.errors import hint
from llamaclust.cluster.control.limits import context_bounds
from llamaclust.cluster.front.app import ENDPOINTS
from llamaclust.cluster.front.dialects.llamacpp.endpoints import DetokenizeBody, TemplateBody, TokenizeBody
from llamaclust.cluster.front.dialects.openai.response_schema import CompactionBody, ResponsesBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.http.connections import ApiPort, listening
from llamaclust.cluster.front.models import AdapterControl, ApiModel
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.schema import Body, field_error, parts_of
from llamaclust.cluster.front.settings import KEPT_REPLIES, ApiSettings
from llamaclust.cluster.front.text.image_rows import RowCache
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.front.text.vision import vision_of
from llamaclust.cluster.server.telemetry.settings import TelemetrySettings
from llamaclust.cluster.state.api_keys import LiveKeys
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.cluster.state.events import ModelUse, Ready, Report
from llamaclust.cluster.state.journal import Journal
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.version import VERSION
from llamaclust.model.gguf.recommended_sampling import recommended_sampling
from llamaclust.model.images.preparation import ImagePreparation
from llamaclust.model.loader import Model
from llamaclust.model.pooling import Pooling

if TYPE_CHECKING:
    from llamaclust.cluster.front.http.certificate import ServerCertificate
    from llamaclust.cluster.server.coordinator import Cluster, ServedModel


_MORE_REQUESTS = 64
"""Number of HTTP requests per model that are allowed in addition to running and waiting requests."""


@dataclass(frozen=True, slots=True)
class Front:
    port: ApiPort
    record: ClusterRecord
    settings: ApiSettings
    telemetry: TelemetrySettings | None
    report: Report


def api_settings(config: ClusterConfig) -> ApiSettings:
    """Returns the settings of the API. Raises UsageError if API keys, default values or folders cannot be used."""
    check_defaults(config.api.defaults)
    max_requests = (config.max_sequences + config.max_waiting + _MORE_REQUESTS) * len(config.of_each_model())
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
        image_hosts=config.api.image_urls,
        defaults=config.api.defaults,
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
        resume_s=config.timeouts.resume,
        request_s=config.timeouts.request,
        idle_s=config.timeouts.idle,
        max_requests=max_requests,
        max_kept_replies=max(KEPT_REPLIES, max_requests),
    )


def _existing(folder: Path | None, key: str) -> Path | None:
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: the folder of {key} does not exist; create it first")
    return folder


@contextmanager
def open_port(config: ClusterConfig, folder: ClusterDir) -> Iterator[ApiPort]:
    """Opens the API's port, with its certificate, and yields it. The port opens before workers are started."""
    certificate = _certificate(config, folder)
    with (
        nullcontext() if certificate is None else certificate.watched(),
        listening(config.addresses, certificate) as port,
    ):
        yield port


def _certificate(config: ClusterConfig, folder: ClusterDir) -> ServerCertificate | None:
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
    keys, trust = config.api_keys_file, config.join.trust_dir
    return ClusterRecord(
        name=config.name,
        pid=os.getpid(),
        api=port.url,
        model=config.of_each_model()[0].model_name,
        api_keys_file=None if keys is None else str(keys.absolute()),
        launcher=config.launcher,
        api_certificate=None if port.certificate is None else str(folder.api_certificate.absolute()),
        trust_dir=None if trust is None else str(trust.absolute()),
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
    """Returns scheme, host and port of the collector's URL. Other parts of the URL might contain a secret."""
    target = None if telemetry is None else telemetry.traces or telemetry.metrics
    if target is None:
        return None
    url = urlsplit(target.url)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


def _use(model: Model) -> ModelUse:
    if model.pooling is Pooling.RANK:
        return ModelUse.RANKS
    return ModelUse.TEXT if model.generates else ModelUse.EMBEDDINGS


BODIES: Final[tuple[type[Body], ...]] = (
    *(endpoint.body for endpoint in ENDPOINTS),
    *(ChatBody, CompletionBody, ResponsesBody, CompactionBody),
    *(TokenizeBody, DetokenizeBody, TemplateBody),
)


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raises UsageError if `api.defaults` has a field that no endpoint has, or a value that no endpoint accepts."""
    objects = [part for kind in BODIES for part in (kind, *parts_of(kind).values())]
    for given, value in defaults.items():
        having = [(kind, name) for kind in objects if (name := kind.foreign.name(given)) in kind.model_fields]
        if not having:
            known = sorted({name for kind in objects for name in (*kind.model_fields, *kind.foreign.other_names)})
            near = hint(given, known).partition("; known")[0]
            raise UsageError(f"api.defaults: no endpoint has a field {given!r}{near or '; remove it'}")
        errors = [field_error(kind, name, value) for kind, name in having if value is not None]
        if errors and (error := errors[0]) is not None and None not in errors:
            raise UsageError(f"api.defaults: {error}")


@asynccontextmanager
async def api_models(
    cluster: Cluster, settings: ApiSettings, journal: Journal, show: Callable[[ServedModel], Mapping[str, Any]]
) -> AsyncIterator[list[ApiModel]]:
    """Yields the served models. `show` returns the JSON object of `GET /cluster`. The caller closes the journal."""
    lifecycles = cluster.rotation.lifecycles
    async with AsyncExitStack() as stack:
        rows, preparation = RowCache(cluster.row_limits), await stack.enter_async_context(ImagePreparation())
        made = (_text_service(served, preparation, rows) for served in cluster.models)
        services = [await stack.enter_async_context(aclosing(service)) for service in made]
        if settings.image_hosts and not any(service.vision for service in services):
            raise UsageError("api.image_urls: no served model reads images; remove api.image_urls")
        replies = await stack.enter_async_context(aclosing(Replies(settings, journal)))
        models: list[ApiModel] = []
        for served, service in zip(cluster.models, services, strict=True):
            model, context_length = served.model, service.settings.context_length
            projector = () if model.projector is None else (model.projector.identity,)
            files = " ".join((model.model_id, *model.adapter_digests.values(), *projector))
            digest = answer_digest(served.config, files, model.chat_template.source, context_length)
            own = _settings_of(served, replace(settings, digest=digest), cluster.models)
            control = AdapterControl(served.loader.load, served.loader.unload)
            status, lifecycle = partial(show, served), lifecycles[served.name]
            models.append(ApiModel(service, own, replies, served.engine, lifecycle, status, control))
        yield models


def _text_service(served: ServedModel, preparation: ImagePreparation, rows: RowCache) -> TextService:
    model, config, engine = served.model, served.config, served.engine
    text = TextSettings(
        served.name,
        served.context_length,
        config.max_sequences,
        str(model.file.path),
        model.plain,
        model.embedding_width,
        model.pooling,
        model.ranking,
        generates=model.generates,
        slots=config.max_sequences if config.api.slot_folder is not None else 0,
        adapters=served.adapters,
        max_drafted=engine.scheduler.settings.max_drafted,
        recommended=recommended_sampling(model.file),
        context_bounds=context_bounds(config, model),
    )
    vision = vision_of(model, engine.encoder, preparation, rows)
    return TextService(engine, model.tokenizer, model.chat_template, text, vision)


def _settings_of(served: ServedModel, settings: ApiSettings, models: Sequence[ServedModel]) -> ApiSettings:
    return replace(
        settings,
        aliases=served.config.api.aliases,
        copies=served.loader.copies,
        can_unload=bool(served.config.models),
        adapters=served.adapters,
        rankers=tuple(model.name for model in models if model.model.ranking is not None),
        recommended=recommended_sampling(served.model.file),
    )


KEYS = frozenset({"model", "mmproj", "chat_template", "context_length", "wire", "kv_type", "api", "adapters"})
"""Keys of the cluster file that affect answers. In `api`, only the key `defaults` affects them."""


def answer_digest(config: ClusterConfig, files: str, chat_template: str | None, context_length: int) -> str:
    """Hashes everything that affects answers. `files` identifies the files of the model, its adapters and its
    projector. `chat_template` is the template's source. `context_length` comes from the plan."""
    defaults = json.dumps(config.api.defaults, sort_keys=True, default=str)
    adapters = tuple((adapter.name, adapter.scale) for adapter in config.adapters)
    keys = (files, chat_template, context_length, config.wire, config.kv_type.value, defaults, adapters)
    return hashlib.sha256(repr((VERSION, NUMERICS_VERSION, *keys)).encode()).hexdigest()
