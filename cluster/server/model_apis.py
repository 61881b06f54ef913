"""The API of a cluster's models: the text service and the replies of each, on one journal, behind one app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.applications import Starlette

from llamaclust.cluster.api.admission import Admission
from llamaclust.cluster.api.app import create_app, create_models_app, model_app
from llamaclust.cluster.api.models.door import DoorModel
from llamaclust.cluster.api.openai.responses.store import ResponseStore
from llamaclust.cluster.api.operations.controls import Controls
from llamaclust.cluster.api.replies.durability import Durability
from llamaclust.cluster.api.replies.handlers import Replies
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.server.answer_digest import answer_digest
from llamaclust.cluster.server.coordinator import Cluster, ServedModel
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import OpenRequest
from llamaclust.cluster.text.service import TextService, TextSettings
from llamaclust.model.gguf.recommended_sampling import recommended_sampling


@dataclass(frozen=True, slots=True)
class ModelApi:
    """Of one model. `digest`: of all that its answers depend on."""

    served: ServedModel
    service: TextService
    replies: Replies
    digest: str

    def continues(self, request: OpenRequest) -> bool:
        """Whether a request that an earlier coordinator left gets the same answer here."""
        admission = request.admission
        return admission.served == self.digest and self.served.adapters.have(admission.adapters)


@asynccontextmanager
async def model_apis(cluster: Cluster, settings: ApiSettings, journal: Journal) -> AsyncIterator[list[ModelApi]]:
    """Of all models, the first one first. The owner of the journal closes it."""
    async with AsyncExitStack() as stack:
        apis: list[ModelApi] = []
        rankers = tuple(served.name for served in cluster.models if served.model.ranking is not None)
        for served in cluster.models:
            service = await stack.enter_async_context(aclosing(_text_service(served)))
            digest = _digest(served, service.settings.context_length)
            durability = Durability(journal, digest, cluster.config.timeouts.request, served.adapters)
            own = replace(
                _settings_of(served, settings, len(cluster.models)),
                rankers=rankers,
                recommended=service.settings.recommended,
            )
            replies = await stack.enter_async_context(aclosing(Replies(own, durability)))
            apis.append(ModelApi(served, service, replies, digest))
        yield apis


async def restore(apis: Sequence[ModelApi], journal: Journal, requests: Sequence[OpenRequest]) -> None:
    """The requests that an earlier coordinator left, each by the model that continues it."""
    await journal.restore(requests)
    for api in apis:
        await api.replies.restore([*filter(api.continues, requests)])


def cluster_app(
    apis: Sequence[ModelApi], cluster: Cluster, admission: Admission, show: Callable[[ServedModel], Mapping[str, Any]]
) -> Starlette:
    """The app of a cluster file's `model`, or of its `models`. `show`: what `GET /cluster` says of one."""
    first = apis[0]
    controls = {api.served.name: Controls(cluster.pool.operations, api.served.loader) for api in apis}
    if not cluster.config.models:
        own = controls[first.served.name]
        return create_app(
            first.service, first.replies, first.served.engine, partial(show, first.served), admission, own
        )
    store, residents = ResponseStore(), cluster.residency.residents
    models = [
        DoorModel(
            model_app(
                api.service,
                api.replies,
                api.served.engine,
                partial(show, api.served),
                controls[api.served.name],
                store,
            ),
            api.service,
            api.replies,
            residents[api.served.name],
            api.served.engine,
        )
        for api in apis
    ]
    return create_models_app(models, first.replies.settings, admission)


def _text_service(served: ServedModel) -> TextService:
    model, config, engine = served.model, served.config, served.engine
    text = TextSettings(
        served.name,
        engine.scheduler.settings.context_length,
        config.max_sequences,
        str(model.file.path),
        model.file,
        model.embedding_width,
        model.pooling,
        model.ranking,
        generates=model.generates,
        slots=config.max_sequences if config.api.slot_folder is not None else 0,
        adapters=served.adapters,
        max_drafted=engine.scheduler.settings.max_drafted,
        recommended=recommended_sampling(model.file),
    )
    return TextService(engine, model.tokenizer, model.chat_template, text)


def _digest(served: ServedModel, context_length: int) -> str:
    model = served.model
    return answer_digest(served.config, model.model_id, model.chat_template.source, context_length)


def _settings_of(served: ServedModel, settings: ApiSettings, models: int) -> ApiSettings:
    """Of several, requests name one, and kept replies share their memory."""
    settings = replace(settings, adapters=served.adapters)
    if not served.config.models:
        return settings
    return replace(
        settings,
        aliases=served.config.api.aliases,
        strict_model=True,
        can_unload=True,
        max_kept_bytes=settings.max_kept_bytes // models,
    )
