"""One model, many machines, the same tokens: a quantized LLaMA-family model over the machines people have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamaclust.cluster.client.http import AsyncClient as AsyncClient
    from llamaclust.cluster.client.http import Client as Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from llamaclust.cluster.client import http

        return getattr(http, name)
    raise AttributeError(f"module 'llamaclust' has no attribute {name!r}")
