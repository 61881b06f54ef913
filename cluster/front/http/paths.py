"""The operations of the API and their paths: how clients write these, behind a prefix, without `/v1`, with HEAD, and by
which names traces show them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as PathRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from llamaclust.cluster.front.errors import choose_shape, error_shape

_WITHOUT_V1: Final = ("/models", "/stream/", "/streams/")
"""First parts of the paths that clients with a base URL without `/v1` request; generating endpoints have both paths."""
_OTHER_NAMES: Final = {"/v1/health": "/health"}
_PARAMETER: Final = re.compile(r"\{(\w+)(?::path)?\}")
_STATE: Final = "traced_route"
_GIVEN: Final = "given_path"
_UNKNOWN: Final = "other"


class Route(PathRoute):
    """One operation of the API. `body`: the class of its fields, for openapi.json; the endpoint reads its body itself.
    `computes`: the model must be loaded. `names_reply`: the path or `?conv_id=` names a kept reply."""

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        body: type[BaseModel] | None = None,
        *,
        computes: bool = False,
        names_reply: bool = False,
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.method = method
        self.body = body
        self.computes = computes
        self.names_reply = names_reply


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
            choose_shape(scope, error_shape(given))  # what is around this has the shape as well, for errors of ours
            scope["state"][_GIVEN] = given
            scope = {**scope, "path": path, "raw_path": path.encode(), "method": method}
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
    """The route of a request, for what is around the app. `name`: None until the key was checked; no text of the
    client."""

    name: str | None = None

    @classmethod
    def of(cls, scope: Scope) -> TracedRoute:
        """The route of a request that the app is about to get."""
        route = cls()
        scope["state"] = {**scope.get("state", {}), _STATE: route}
        return route


def name_route(scope: Scope) -> None:
    """Names the route of a request whose key was checked, if the request is traced."""
    traced = scope.get("state", {}).get(_STATE)
    if traced is not None:
        posts = (route for route in scope["app"].routes if isinstance(route, Route) and route.method == "POST")
        paths = (template(route.path) for route in posts if route.path_regex.match(scope["path"]))
        traced.name = next(paths, _UNKNOWN)
