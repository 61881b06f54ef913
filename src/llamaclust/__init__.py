"""Run one large language model across several machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaclust.core.version import VERSION

if TYPE_CHECKING:
    from llamaclust.cluster.client.http import AsyncClient as AsyncClient
    from llamaclust.cluster.client.http import Client as Client
    from llamaclust.cluster.client.session import AsyncChatSession as AsyncChatSession
    from llamaclust.cluster.client.session import ChatSession as ChatSession

__version__ = VERSION
__all__ = ["AsyncChatSession", "AsyncClient", "ChatSession", "Client", "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from llamaclust.cluster.client import http

        return getattr(http, name)
    if name in ("AsyncChatSession", "ChatSession"):
        from llamaclust.cluster.client import session

        return getattr(session, name)
    raise AttributeError(f"module 'llamaclust' has no attribute {name!r}")
