"""Describes the API from its routes, for `GET /openapi.json` and `GET /docs`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from html import escape
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute

from llamaclust.cluster.front.errors import ErrorShape, shape_of_path
from llamaclust.cluster.front.http.gates import OPEN_PATHS
from llamaclust.cluster.front.http.responses import EVENTS, JSON, Route, template
from llamaclust.core.version import VERSION

_REFUSALS: Final = {
    "400": "a field that is wrong or not supported, or a prompt that is too long",
    "401": "no API key, or an unknown one",
    "403": "a Host header, an origin or an operation that is not allowed",
    "404": "an unknown path, model or reply",
    "405": "a method that the path does not support",
    "408": "a body that arrived too slowly",
    "409": "a stream that was computed again, or another download in progress",
    "413": "a body that is too large",
    "415": "a compressed body",
    "422": "an idempotency key used with another body, or a request that failed again and again",
    "429": "a full queue; Retry-After says when to try again",
    "500": "an error of the server",
    "502": "a download that failed",
    "503": "a cluster that is starting, is stopping, or lacks a worker",
    "504": "a deadline that has passed",
    "501": "a feature that this server does not support",
}
_OTHERS: Final = "additionalProperties"
_EVENT: Final = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}, "id": {"type": "string"}},
}
"""Schema of one event. It describes a whole stream, because OpenAPI 3.1 has no schema for a series of events."""
_SCHEMAS: Final[dict[str, Any]] = {JSON: {}, EVENTS: _EVENT}
_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-size:.9em}table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;"
    "padding:.2rem .6rem;border-top:1px solid #8886}summary{cursor:pointer;padding:.4rem 0}"
)
_HEADERS: Final = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


class Document:
    def __init__(self, *, is_strict: bool) -> None:
        self._is_strict = is_strict

    async def show(self, request: Request) -> Response:
        return JSONResponse(describe(request.app.routes, is_strict=self._is_strict))

    async def show_page(self, request: Request) -> Response:
        """Shows all operations and the fields of their bodies on one page, which has no scripts and loads no files."""
        return HTMLResponse(_page(describe(request.app.routes, is_strict=self._is_strict)), headers=_HEADERS)


@cache
def _request_body(body: type[BaseModel]) -> dict[str, Any]:
    """Returns the OpenAPI description of a request body. Null is allowed for each optional field and means no value."""
    schema = _inlined(body.model_json_schema())
    required, fields = schema.get("required", ()), schema.get("properties", {})
    if fields:
        schema["properties"] = {name: part if name in required else _nullable(part) for name, part in fields.items()}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}


def describe(routes: Iterable[BaseRoute], *, is_strict: bool) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document. Unless `is_strict` is true, its schemas allow unknown fields."""
    paths: dict[str, dict[str, Any]] = {}
    errors: dict[str, Any] = {}
    for route in routes:
        if isinstance(route, Route):
            path, shape = template(route.path), route.errors or shape_of_path(route.path)
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, shape, is_strict)
            errors[shape.schema_name] = shape.schema
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "llamaclust", "version": VERSION},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"header": []}],
        "components": {"securitySchemes": keys, "schemas": errors},
    }


def _page(document: Mapping[str, Any]) -> str:
    parts = "".join(
        _shown(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>llamaclust API</title><style>{_STYLE}</style>'
    intro = "<h1>llamaclust API</h1><p>For programs: <a href='openapi.json'>openapi.json</a></p>"
    return f"{head}<main>{intro}{parts}</main></html>"


def _operation(route: Route, path: str, shape: ErrorShape, is_strict: bool) -> dict[str, Any]:
    body = {} if route.body is None else _request_body(route.body)
    schemas = {kind: _SCHEMAS.get(kind, {"type": "string"}) for kind in route.types}
    error = {"$ref": f"#/components/schemas/{shape.schema_name}"}
    text = " ".join((route.endpoint.__doc__ or path).split())
    return {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
        "summary": text.partition(". ")[0],
        "parameters": [*_parameters(route, path)],
        **({"security": []} if path in OPEN_PATHS else {}),
        **(body if is_strict else _open(body)),
        "responses": {str(route.status): _reply("the reply", schemas) if schemas else {"description": "done"}}
        | {status: _reply(why, {JSON: error}) for status, why in _REFUSALS.items()},
    }


def _parameters(route: Route, path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"\{(\w+)\}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name, kind, text in route.query:
        yield {"name": name, "in": "query", "description": text, "schema": {"type": kind}}


def _reply(text: str, schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}


def _fields(operation: Mapping[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    fields: dict[str, Any] = content.get(JSON, {}).get("schema", {}).get("properties", {})
    return fields


def _shown(path: str, method: str, operation: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(str(schema.get('default', '')))}"
        f"<td>{escape(str(schema.get('description', '')))}"
        for name, schema in _fields(operation).items()
    )
    table = f"<table><tr><th>field<th>default<th>meaning{rows}</table>" if rows else ""
    title = f"<summary><code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}</summary>"
    return f"<details>{title}{table}</details>"


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = schema.get("anyOf", [])
    if {"type": "null"} in kinds:
        return schema
    shown: dict[str, Any] = {key: schema[key] for key in ("description", "default") if key in schema}
    return {"anyOf": [schema, {"type": "null"}], **shown}


def _mapped(schema: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    if isinstance(schema, list):
        return [_mapped(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return change({key: _mapped(value, change) for key, value in schema.items()})


def _open(schema: Any) -> Any:
    return _mapped(schema, lambda part: part | {_OTHERS: True} if part.get(_OTHERS) is False else part)


def _inlined(schema: dict[str, Any]) -> Any:
    definitions = schema.pop("$defs", {})

    def inline(part: dict[str, Any]) -> Any:
        return _mapped(definitions[part["$ref"].rpartition("/")[2]], inline) if "$ref" in part else part

    return _mapped(schema, inline)
