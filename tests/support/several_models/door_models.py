"""Models behind a door without a cluster: apps, and residents of a scripted state."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import cast

from starlette.types import ASGIApp

from llamaclust.cluster.api.models.door import DoorModel
from llamaclust.cluster.api.replies.handlers import Replies
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.text.service import TextService


class ScriptedResident:
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

    async def sleep(self) -> None:
        self.is_asleep = self.is_idle


def door_model(
    name: str,
    app: ASGIApp,
    resident: ScriptedResident | None = None,
    *,
    aliases: tuple[str, ...] = (),
    kept: Collection[str] = (),
) -> DoorModel:
    """`kept`: the names of its replies that are kept."""
    cache = SimpleNamespace(named=lambda owner, reply: reply if reply in kept else None)
    return DoorModel(
        app,
        cast(TextService, SimpleNamespace(settings=SimpleNamespace(model_name=name))),
        cast(Replies, SimpleNamespace(settings=ApiSettings(aliases=aliases), cache=cache)),
        resident or ScriptedResident(),
        cast(Engine, SimpleNamespace()),
    )
