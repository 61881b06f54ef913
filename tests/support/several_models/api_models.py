"""Served models of an app without a cluster, with lifecycles of a scripted state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any, cast

from llamaclust.cluster.control.model_lifecycle import ModelLifecycle
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.models import AdapterControl, ApiModel
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.service import TextService


class ScriptedLifecycle:
    """`sleep` ends asleep unless there are requests."""

    def __init__(self) -> None:
        self.keep_alive_s: float | None = None
        self.expires_in_s: float | None = None
        self.is_asleep, self.is_loading, self.is_idle, self.is_leaving = False, False, True, False

    def keep(self, seconds: float | None) -> None:
        self.keep_alive_s = seconds

    def enter(self) -> None:
        self.is_idle = False

    def leave(self) -> None:
        self.is_idle = True

    def load(self) -> None:
        self.is_asleep = False

    async def preload(self) -> None:
        self.load()

    async def sleep(self) -> None:
        self.is_asleep = self.is_idle


def api_model(
    service: TextService,
    engine: Engine,
    settings: ApiSettings | None = None,
    status: Callable[[], Mapping[str, Any]] = dict,
    control: AdapterControl | None = None,
    replies: Replies | None = None,
) -> ApiModel:
    """A model that is always loaded. `engine`: the one that operators see; `replies`: of all models."""
    replies = replies or Replies(settings or ApiSettings())
    return ApiModel(
        service,
        settings or replies.settings,
        replies,
        engine,
        cast(ModelLifecycle, ScriptedLifecycle()),
        status,
        control,
    )


def named_model(
    name: str,
    lifecycle: ScriptedLifecycle | None = None,
    *,
    aliases: tuple[str, ...] = (),
    kept: Collection[str] = (),
    **settings: Any,
) -> ApiModel:
    """One of several models, which only its name and its state are known of. `kept`: the names of its kept replies."""
    own = ApiSettings(aliases=aliases, **{"can_unload": True, **settings})
    cache = SimpleNamespace(named=lambda owner, reply: reply if reply in kept else None)
    return ApiModel(
        cast(TextService, SimpleNamespace(settings=SimpleNamespace(model_name=name))),
        own,
        cast(Replies, SimpleNamespace(settings=own, cache=cache)),
        cast(Engine, SimpleNamespace()),
        cast(ModelLifecycle, lifecycle or ScriptedLifecycle()),
        dict,
    )
