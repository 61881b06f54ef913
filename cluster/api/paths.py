"""Paths: what the app serves under them, how clients write them, behind a prefix, without `/v1`, with HEAD, and by
which names traces show them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.routing import Route as ServedRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from llamaclust.cluster.api.errors import choose_shape, error_shape

_WITHOUT_V1: Final = ("/models", "/stream/", "/streams/")
"""First parts of the paths that clients with a base URL without `/v1` request; generating endpoints have both paths."""
_OTHER_NAMES: Final = {"/v1/health": "/health"}
_PARAMETER: Final = re.compile(r"\{(\w+)(?::path)?\}")
_STATE: Final = "traced_route"
_GIVEN: Final = "given_path"
_UNKNOWN: Final = "other"


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. `body`: the class of its fields, for openapi.json; it reads its body itself."""

    method: str
    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    body: type[BaseModel] | None = None


class Paths:
    """Passes requests on with the path and the method by which the app knows them."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        """`prefix`: "" or "/..."; paths without it are served too, for probes and this program's own clients."""
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given: str = scope["path"]
            if self._prefix and given.startswith(self._prefix + "/"):
                given = given.removeprefix(self._prefix)
            path = canonical_path(given)
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server sends no body then
            scope = {**scope, "path": path, "raw_path": path.encode(), "method": method}
            choose_shape(scope, error_shape(given))
            scope["state"][_GIVEN] = given
        await self._app(scope, receive, send)


def given_path(scope: Scope) -> str:
    """The path as the client wrote it, without the prefix."""
    path: str = scope.get("state", {}).get(_GIVEN, scope["path"])
    return path


def canonical_path(path: str) -> str:
    """The path of the endpoint."""
    if path.startswith(_WITHOUT_V1):
        return "/v1" + path
    return _OTHER_NAMES.get(path, path)


def template(path: str) -> str:
    """A route's path as clients know it, with `{name}` for each of its parameters."""
    return _PARAMETER.sub(r"{\1}", path)


@dataclass(slots=True)
class TracedRoute:
    """Of a request, for what is around the app. `name`: None until its key has been checked; no text of the client."""

    name: str | None = None

    @classmethod
    def of(cls, scope: Scope) -> TracedRoute:
        """Of a request that the app is about to get."""
        route = cls()
        scope["state"] = {**scope.get("state", {}), _STATE: route}
        return route


class RouteNames:
    """Names the routes of traced requests. Inside of all that checks access: other requests stay without names."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        own = [route for route in routes if isinstance(route, ServedRoute)]
        self._posts = [(route.path_regex, template(route.path)) for route in own if "POST" in (route.methods or ())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        if _STATE in state and state["is_trusted"]:
            state[_STATE].name = self._name(scope["path"])
        await self._app(scope, receive, send)

    def _name(self, path: str) -> str:
        return next((name for pattern, name in self._posts if pattern.match(path)), _UNKNOWN)
