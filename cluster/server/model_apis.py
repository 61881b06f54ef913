"""The models of a cluster as the API has them: the text service and the replies of each, on one journal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llamaclust.cluster.front.models import AdapterControl, ApiModel
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.restoring import Durability
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.service import TextService, TextSettings
from llamaclust.cluster.server.answer_digest import answer_digest
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import OpenRequest
from llamaclust.model.gguf.recommended_sampling import recommended_sampling

if TYPE_CHECKING:
    from llamaclust.cluster.server.coordinator import Cluster, ServedModel


@asynccontextmanager
async def api_models(
    cluster: Cluster, settings: ApiSettings, journal: Journal, show: Callable[[ServedModel], Mapping[str, Any]]
) -> AsyncIterator[list[ApiModel]]:
    """All models, the first one first. `show`: the JSON of `GET /cluster`. The owner of the journal closes it."""
    residents = cluster.residency.residents
    async with AsyncExitStack() as stack:
        models: list[ApiModel] = []
        for served in cluster.models:
            service = await stack.enter_async_context(aclosing(_text_service(served)))
            model, context_length = served.model, service.settings.context_length
            digest = answer_digest(served.config, model.model_id, model.chat_template.source, context_length)
            durability = Durability(journal, digest, cluster.config.timeouts.request, served.adapters)
            own = _settings_of(served, settings, cluster.models)
            replies = await stack.enter_async_context(aclosing(Replies(own, durability)))
            control = AdapterControl(served.loader.load, served.loader.unload)
            status, resident = partial(show, served), residents[served.name]
            models.append(ApiModel(service, replies, served.engine, resident, status, control, digest))
        yield models


async def restore(models: Sequence[ApiModel], journal: Journal, requests: Sequence[OpenRequest]) -> None:
    """The requests that an earlier coordinator left, each by the model that continues it."""
    await journal.restore(requests)
    for model in models:
        await model.replies.restore([*filter(model.continues, requests)])


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


def _settings_of(served: ServedModel, settings: ApiSettings, models: Sequence[ServedModel]) -> ApiSettings:
    """The settings of one of the models: of `models` in the cluster file, requests name one, and the kept replies share
    their memory."""
    are_several = bool(served.config.models)
    return replace(
        settings,
        aliases=served.config.api.aliases,
        strict_model=are_several or settings.strict_model,
        can_unload=are_several,
        max_kept_bytes=settings.max_kept_bytes // len(models),
        adapters=served.adapters,
        rankers=tuple(model.name for model in models if model.model.ranking is not None),
        recommended=recommended_sampling(served.model.file),
    )
