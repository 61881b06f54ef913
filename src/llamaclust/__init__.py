"""Run one large language model across several machines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llamaclust.core.version import VERSION

if TYPE_CHECKING:
    from llamaclust.cluster.client.http import AsyncClient as AsyncClient
    from llamaclust.cluster.client.http import Client as Client
    from llamaclust.cluster.client.session import AsyncChatSession as AsyncChatSession
    from llamaclust.cluster.client.session import ChatSession as ChatSession
    from llamaclust.cluster.launchers.in_process import LocalSettings as LocalSettings

__version__ = VERSION
__all__ = ["AsyncChatSession", "AsyncClient", "ChatSession", "Client", "LocalSettings", "__version__"]
_MODULES = {
    "AsyncChatSession": "cluster.client.session",
    "AsyncClient": "cluster.client.http",
    "ChatSession": "cluster.client.session",
    "Client": "cluster.client.http",
    "LocalSettings": "cluster.launchers.in_process",
}
"""Modules of names that are imported on first use."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'llamaclust' has no attribute {name!r}")
