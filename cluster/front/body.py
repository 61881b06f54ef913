"""Request bodies as they arrive: bounded in size, time and depth, and JSON."""

from __future__ import annotations

import asyncio
import codecs
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from pydantic_core import from_json
from starlette.requests import Request

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.foreign_fields import ALWAYS_LOADED, SLOTS_NOT_KEPT
from llamaclust.cluster.front.http.ignored import is_strict_request
from llamaclust.cluster.front.json_text import MAX_FIELD_VALUES, Member, Outline, has_many_values, outline
from llamaclust.cluster.front.schema import AnyBody, Body, ForeignFields, Leniency, read_fields
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.sharing import Threads, report_ignored, run_on
from llamaclust.core.errors import ParameterError

_READ = "read_body"
LARGE_BYTES = 1 << 16
"""Larger bodies are counted, parsed and checked on a thread."""
_MOST_OF_A_PLACE = 200

_MOST_VALUES = (1 << 20) + (1 << 16)
"""JSON values of a body: a prompt of token ids that fills the longest context, and the other fields. To make so many
holds up the process for a fifth of a second."""
_PROMPT_FIELDS = {
    *("prompt", "suffix", "input_prefix", "input_suffix", "input_extra", "context", "content", "tokens"),
    *("messages", "system", "input", "instructions", "query", "documents", "texts"),
}
"""Hold what the model reads: as much as a body may."""
_MOST_FIELD_BYTES = 1 << 22
_MOST_FIELD_VALUES = {"tools": 1 << 17}
_MOST_FIELDS = 1024

_reading = Threads(1, "read-body")
"""One: Python parses one body at a time anyway, and streams go on beside it."""
_converting = Threads(1, "convert-body")
"""Bodies that were read go on before others are read: fewer of them are held at once."""

_Made = TypeVar("_Made")
_Arguments = ParamSpec("_Arguments")


async def read_body(request: Request, kind: type[AnyBody], foreign: ForeignFields, settings: ApiSettings) -> AnyBody:
    """The request's body. Raises HttpError (413, 408, 415, 400), and what `read_fields` raises."""
    return await parse_body(await read_bytes(request, settings), kind, foreign, settings)


async def parse_body(data: bytes, kind: type[AnyBody], foreign: ForeignFields, settings: ApiSettings) -> AnyBody:
    """The reply names the fields that have no effect. Raises HttpError (400), and what `read_fields` raises."""
    leniency = None if settings.is_strict or is_strict_request() else Leniency()

    def parse() -> AnyBody:
        fields = _with_defaults(parse_object(data), kind, foreign, settings)
        return read_fields(kind, fields, _with_idle(foreign, kind, settings), leniency)

    body = parse() if len(data) <= LARGE_BYTES else await run_on(_reading, parse)
    if leniency is not None and leniency.ignored:
        report_ignored(leniency.ignored)
    return body


async def converted(
    body: Body, make: Callable[_Arguments, _Made], *given: _Arguments.args, **named: _Arguments.kwargs
) -> _Made:
    """Calls `make` with a body, on a thread where the body has many values, such as a large schema."""
    if not has_many_values([*vars(body).values()]):
        return make(*given, **named)
    return await run_on(_converting, make, *given, **named)


def _with_idle(foreign: ForeignFields, kind: type[AnyBody], settings: ApiSettings) -> ForeignFields:
    """Also the endpoint's own fields that have no effect with these settings."""
    hints = dict(foreign.hints)
    if settings.slot_folder is None and "id_slot" in kind.model_fields:
        hints |= SLOTS_NOT_KEPT
    if not settings.can_unload and "keep_alive" in kind.model_fields:
        hints |= ALWAYS_LOADED
    return replace(foreign, hints=hints)


async def has_field(data: bytes, name: str) -> bool:
    """Returns whether a body has a field. Raises what `parse_object` raises, unless the body is large."""
    if len(data) <= LARGE_BYTES:
        return name in parse_object(data)
    return any(member.name == name for member in (await run_on(_reading, outline, data)).members)


def _with_defaults(
    fields: dict[str, Any], kind: type[AnyBody], foreign: ForeignFields, settings: ApiSettings
) -> dict[str, Any]:
    """The fields of a body, and the server's values of those that the endpoint has and the body has under no name."""
    if not settings.defaults and not settings.recommended:
        return fields
    filled = _filled(fields, kind, foreign, settings)
    for name, part in foreign.parts.items():
        inner, known = filled.get(name), kind.model_fields[name].annotation
        if (inner is None or isinstance(inner, dict)) and isinstance(known, type) and issubclass(known, Body):
            filled[name] = _filled(inner or {}, known, part, settings)
    return filled


def _filled(fields: dict[str, Any], kind: type[Body], foreign: ForeignFields, settings: ApiSettings) -> dict[str, Any]:
    given = {foreign.name(name) for name, value in fields.items() if value is not None}
    defaults = {**settings.recommended, **settings.defaults} if kind.takes_recommended else settings.defaults
    own = ((foreign.name(name), value) for name, value in defaults.items())
    return fields | {name: value for name, value in own if name in kind.model_fields and name not in given}


async def parse_object_in_time(data: bytes) -> dict[str, Any]:
    """As `parse_object`; a large one in a thread."""
    return parse_object(data) if len(data) <= LARGE_BYTES else await run_on(_reading, parse_object, data)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. HttpError and ParameterError for one that has too many values, before they are made; errors of
    `parse_json`."""
    if len(data) > LARGE_BYTES:
        _check_sizes(outline(data))
    payload = parse_json(data)
    if not isinstance(payload, dict):
        raise HttpError(400, "invalid_json", "the body must be a JSON object")
    return payload


def _check_sizes(counted: Outline) -> None:
    for member in counted.members:
        if member.name not in _PROMPT_FIELDS:
            _check_field(member)
    for what, count, most in (
        ("fields", counted.member_count, _MOST_FIELDS),
        ("values", counted.values, _MOST_VALUES),
    ):
        if count > most:
            raise HttpError(413, "body_too_large", f"the body has {count} {what}, at most {most} are taken")


def _check_field(member: Member) -> None:
    name = member.name[:_MOST_OF_A_PLACE] or "a field"
    if member.size_bytes > _MOST_FIELD_BYTES:
        raise ParameterError(name, f"has {member.size_bytes} bytes of JSON, at most {_MOST_FIELD_BYTES} are taken")
    most = _MOST_FIELD_VALUES.get(member.name, MAX_FIELD_VALUES)
    if member.values > most:
        raise ParameterError(name, f"has {member.values} JSON values, at most {most} are taken")


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
    if isinstance(value, list) and set(map(type, value)).isdisjoint((float, dict, list)):
        return None  # ids and texts, which may be many
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if (place := _not_finite(item)) is not None:
            return f".{key}{place}" if isinstance(value, dict) else f"[{key}]{place}"
    return None


async def read_bytes(request: Request, settings: ApiSettings, most_bytes: int | None = None) -> bytes:
    """Reads a body of at most `most_bytes`, or of the general limit. Raises HttpError (413, 408, 415)."""
    most = settings.max_body_bytes if most_bytes is None else most_bytes
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding {encoding[:60]!r} is not supported: send the body as it is"
        raise HttpError(415, "unsupported_encoding", message)
    length = request.headers.get("content-length", "")
    too_large = length.isascii() and length.isdigit() and int(length[:18]) > most
    try:
        async with asyncio.timeout(settings.body_s):
            data = None if too_large else await _read_all(request, most)
    except TimeoutError:
        raise HttpError(408, "request_timeout", f"the body did not arrive within {settings.body_s:g} s") from None
    if data is None:
        raise HttpError(413, "body_too_large", f"the body is larger than {most} bytes", {"Connection": "close"})
    return data


def hand_on(request: Request, data: bytes) -> None:
    """Leaves a body that was read to the next call of `read_bytes` for this request."""
    request.scope[_READ] = data


async def _read_all(request: Request, max_bytes: int) -> bytes | None:
    """None where there is more; the rest is still to come then."""
    if (read := request.scope.pop(_READ, None)) is not None:
        return read if len(read) <= max_bytes else None
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            return None
    return bytes(data)
