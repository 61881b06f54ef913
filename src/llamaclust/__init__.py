"""Run one large language model across several machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaclust.core.version import VERSION

if TYPE_CHECKING:
    from llamaclust.cluster.client.http import AsyncClient as AsyncClient
    from llamaclust.cluster.client.http import Client as Client

__version__ = VERSION
__all__ = ["AsyncClient", "Client", "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from llamaclust.cluster.client import http

        return getattr(http, name)
    raise AttributeError(f"module 'llamaclust' has no attribute {name!r}")
