"""Request bodies as they arrive: bounded in size, time and depth, and JSON."""

from __future__ import annotations

import asyncio
import codecs
import math
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.foreign_fields import ALWAYS_LOADED, SLOTS_NOT_KEPT
from llamaclust.cluster.api.ignored import report_ignored
from llamaclust.cluster.api.schema import AnyBody, Body, ForeignFields, Leniency, read_fields
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.text.threads import run_on
from llamaclust.core.errors import ParameterError

_BLOCKING_BYTES = 1 << 16
"""Larger bodies are parsed on a thread."""

_MOST_OF_A_PLACE = 200

_parsing = ThreadPoolExecutor(2, "parse-body")


async def read_body(request: Request, kind: type[AnyBody], foreign: ForeignFields, settings: ApiSettings) -> AnyBody:
    """The request's body. Raises HttpError (413, 408, 415, 400), and what `read_fields` raises."""
    return await parse_body(await read_bytes(request, settings), kind, foreign, settings)


async def parse_body(data: bytes, kind: type[AnyBody], foreign: ForeignFields, settings: ApiSettings) -> AnyBody:
    """The reply names the fields that have no effect. Raises HttpError (400), and what `read_fields` raises."""
    leniency = None if settings.is_strict else Leniency()

    def parse() -> AnyBody:
        fields = _with_defaults(parse_object(data), kind, foreign, settings)
        return read_fields(kind, fields, _with_idle(foreign, kind, settings), leniency)

    body = parse() if len(data) <= _BLOCKING_BYTES else await run_on(_parsing, parse)
    if leniency is not None and leniency.ignored:
        report_ignored(leniency.ignored)
    return body


def _with_idle(foreign: ForeignFields, kind: type[AnyBody], settings: ApiSettings) -> ForeignFields:
    """Also the endpoint's own fields that have no effect with these settings."""
    hints = dict(foreign.hints)
    if settings.slot_folder is None and "id_slot" in kind.model_fields:
        hints |= SLOTS_NOT_KEPT
    if not settings.can_unload and "keep_alive" in kind.model_fields:
        hints |= ALWAYS_LOADED
    return replace(foreign, hints=hints)


async def has_field(data: bytes, name: str) -> bool:
    """Whether a body has a field. Raises what `parse_body` raises for one that is no JSON object."""
    return name in await parse_object_in_time(data)


def _with_defaults(
    fields: dict[str, Any], kind: type[AnyBody], foreign: ForeignFields, settings: ApiSettings
) -> dict[str, Any]:
    """The fields of a body, and the server's values of those that the endpoint has and the body has under no name."""
    if not settings.defaults:
        return fields
    filled = _filled(fields, kind.model_fields.keys(), foreign, settings)
    for name, part in foreign.parts.items():
        inner, known = filled.get(name), kind.model_fields[name].annotation
        if (inner is None or isinstance(inner, dict)) and isinstance(known, type) and issubclass(known, Body):
            filled[name] = _filled(inner or {}, known.model_fields.keys(), part, settings)
    return filled


def _filled(
    fields: dict[str, Any], known: Collection[str], foreign: ForeignFields, settings: ApiSettings
) -> dict[str, Any]:
    given = {foreign.name(name) for name, value in fields.items() if value is not None}
    own = ((foreign.name(name), value) for name, value in settings.defaults.items())
    return fields | {name: value for name, value in own if name in known and name not in given}


async def parse_object_in_time(data: bytes) -> dict[str, Any]:
    """As `parse_object`; a large one in a thread."""
    return parse_object(data) if len(data) <= _BLOCKING_BYTES else await run_on(_parsing, parse_object, data)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object, with the errors of `parse_json`."""
    payload = parse_json(data)
    if not isinstance(payload, dict):
        raise HttpError(400, "invalid_json", "the body must be a JSON object")
    return payload


def parse_json(data: bytes) -> Any:
    """JSON, nested 200 levels deep at most. HttpError for what is none, ParameterError for numbers that no reply could
    show."""
    try:
        payload = from_json(data.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        reason = "it is nested too deeply" if "recursion limit" in str(error) else str(error)
        raise HttpError(400, "invalid_json", f"the body is not valid JSON: {reason}") from error
    if (place := _not_finite(payload)) is not None:
        raise ParameterError(place.removeprefix(".")[:_MOST_OF_A_PLACE], "must be a finite number")
    return payload


def _not_finite(value: Any) -> str | None:
    """The place of a number that JSON lacks (NaN) or Python reads as infinite (1e999), if there is one."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    if not isinstance(value, dict | list):
        return None
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if (place := _not_finite(item)) is not None:
            return f".{key}{place}" if isinstance(value, dict) else f"[{key}]{place}"
    return None


async def read_bytes(request: Request, settings: ApiSettings) -> bytes:
    """Raises HttpError (413, 408, 415)."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding {encoding[:60]!r} is not supported: send the body as it is"
        raise HttpError(415, "unsupported_encoding", message)
    length = request.headers.get("content-length", "")
    too_large = length.isascii() and length.isdigit() and int(length[:18]) > settings.max_body_bytes
    try:
        async with asyncio.timeout(settings.body_s):
            data = None if too_large else await _read_all(request, settings.max_body_bytes)
    except TimeoutError:
        raise HttpError(408, "request_timeout", f"the body did not arrive within {settings.body_s:g} s") from None
    if data is None:
        most = f"{settings.max_body_bytes} bytes"
        raise HttpError(413, "body_too_large", f"the body is larger than {most}", {"Connection": "close"})
    return data


async def _read_all(request: Request, max_bytes: int) -> bytes | None:
    """None where there is more; the rest is still to come then."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            return None
    return bytes(data)
