"""Reads request bodies. Limits their size, their nesting depth, and the time to receive them."""

from __future__ import annotations

import asyncio
import codecs
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, Final, ParamSpec, TypeVar

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaclust.cluster.front.defaults import usable_defaults
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.foreign_fields import ALWAYS_LOADED, SLOTS_NOT_KEPT
from llamaclust.cluster.front.images.urls import ImageRules
from llamaclust.cluster.front.json_text import MAX_FIELD_VALUES, Member, Outline, has_many_values, outline
from llamaclust.cluster.front.schema import AnyBody, Body, BodyContext, LenientContext, Neutral, parts_of, read_fields
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.sharing import Threads, ignored_parts, report_ignored, run_on
from llamaclust.core.errors import ParameterError

_READ = "read_body"
LARGE_BYTES = 1 << 16
"""Bodies with more bytes than this are parsed and checked on a thread."""
_MOST_OF_A_PLACE = 200

_MOST_VALUES = (1 << 20) + (1 << 16)
"""Maximum number of JSON values in a body. A prompt that fills the longest context has 2**20 token ids."""
_PROMPT_FIELDS = {
    *("prompt", "suffix", "input_prefix", "input_suffix", "input_extra", "context", "content", "tokens"),
    *("messages", "system", "input", "instructions", "query", "documents", "texts", "images"),
}
"""Fields that contain input for the model. The limits on the size of a single field do not apply to them."""
_MOST_FIELD_BYTES = 1 << 22
_MOST_FIELD_VALUES = {"tools": 1 << 17}
_MOST_FIELDS = 1024

_reading = Threads(1, "read-body")
"""The thread that parses large bodies. Several threads would not be faster, because of the interpreter lock."""
_converting = Threads(1, "convert-body")
"""The thread that converts parsed bodies to requests for the model."""

_Made = TypeVar("_Made")
_Arguments = ParamSpec("_Arguments")


async def read_body(
    request: Request, kind: type[AnyBody], settings: ApiSettings, images: ImageRules | None = None
) -> AnyBody:
    return await parse_body(await read_bytes(request, settings), kind, settings, images)


async def parse_body(
    data: bytes, kind: type[AnyBody], settings: ApiSettings, images: ImageRules | None = None
) -> AnyBody:
    """Parses a body, and reports ignored fields to the client. `images` is None if the model cannot read images."""
    context = BodyContext(images) if settings.is_strict or _is_strict.get() else LenientContext(images)

    def parse() -> AnyBody:
        return read_fields(kind, _with_defaults(parse_object(data), kind, settings), context, _idle(kind, settings))

    body = parse() if len(data) <= LARGE_BYTES else await run_on(_reading, parse)
    if isinstance(context, LenientContext) and context.ignored:
        report_ignored(context.ignored)
    return body


async def converted(
    body: Body, make: Callable[_Arguments, _Made], *given: _Arguments.args, **named: _Arguments.kwargs
) -> _Made:
    """Returns `make(*given, **named)`. Makes the call on a thread if `body` has many values."""
    if not has_many_values([*vars(body).values()]):
        return make(*given, **named)
    return await run_on(_converting, make, *given, **named)


def _idle(kind: type[Body], settings: ApiSettings) -> dict[str, Neutral]:
    slots = {} if settings.slot_folder is not None or "id_slot" not in kind.model_fields else SLOTS_NOT_KEPT
    return slots if settings.can_unload or "keep_alive" not in kind.model_fields else slots | ALWAYS_LOADED


async def has_field(data: bytes, name: str) -> bool:
    """Returns True if the JSON object in `data` has a field `name` that is not null."""
    if len(data) <= LARGE_BYTES:
        return parse_object(data).get(name) is not None
    members = (await run_on(_reading, outline, data)).members
    return {member.name: not member.is_null for member in members}.get(name, False)


def _with_defaults(fields: dict[str, Any], kind: type[Body], settings: ApiSettings) -> dict[str, Any]:
    """Fills absent fields with the server's default values, except values that conflict with fields of the request."""
    if not settings.defaults and not settings.recommended:
        return fields
    given = {kind.foreign.name(name): value for name, value in fields.items() if value is not None}
    defaults = {**settings.recommended, **settings.defaults} if kind.takes_recommended else settings.defaults
    own = {kind.foreign.name(name): value for name, value in defaults.items()}
    filled = fields | usable_defaults(own, given, kind.model_fields)
    for name, part in parts_of(kind).items():
        if (inner := filled.get(name)) is None or isinstance(inner, dict):
            filled[name] = _with_defaults(inner or {}, part, settings)
    return filled


async def parse_object_in_time(data: bytes) -> dict[str, Any]:
    return parse_object(data) if len(data) <= LARGE_BYTES else await run_on(_reading, parse_object, data)


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises HttpError or ParameterError if `data` is no JSON object or is too large."""
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
            raise HttpError(413, "body_too_large", f"the body has {count} {what}; the limit is {most}")


def _check_field(member: Member) -> None:
    name = member.name[:_MOST_OF_A_PLACE] or "a field"
    if member.size_bytes > _MOST_FIELD_BYTES:
        raise ParameterError(name, f"has {member.size_bytes} bytes of JSON; the limit is {_MOST_FIELD_BYTES}")
    most = _MOST_FIELD_VALUES.get(member.name, MAX_FIELD_VALUES)
    if member.values > most:
        raise ParameterError(name, f"has {member.values} JSON values; the limit is {most}")


def parse_json(data: bytes) -> Any:
    """Parses JSON. Raises HttpError if the text is not valid JSON, and ParameterError for numbers such as NaN."""
    try:
        payload = from_json(data.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        reason = "it is nested too deeply" if "recursion limit" in str(error) else str(error)
        raise HttpError(400, "invalid_json", f"the body is not valid JSON: {reason}") from error
    if (place := _not_finite(payload)) is not None:
        raise ParameterError(place.removeprefix(".")[:_MOST_OF_A_PLACE], "must be a finite number")
    return payload


def _not_finite(value: Any) -> str | None:
    """Returns the path of the first NaN or infinity, such as `.a[3]`, or None if all numbers are finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    if not isinstance(value, dict | list):
        return None
    if isinstance(value, list) and set(map(type, value)).isdisjoint((float, dict, list)):
        return None  # A list of only ids or texts may be long, and none of them is NaN or infinite.
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if (place := _not_finite(item)) is not None:
            return f".{key}{place}" if isinstance(value, dict) else f"[{key}]{place}"
    return None


async def read_bytes(request: Request, settings: ApiSettings, most_bytes: int | None = None) -> bytes:
    """Reads a request's body. `most_bytes` defaults to `settings.max_body_bytes`. Raises HttpError (408, 413, 415)."""
    most = settings.max_body_bytes if most_bytes is None else most_bytes
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding {encoding[:60]!r} is not supported: send the body uncompressed"
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
    request.scope[_READ] = data


async def _read_all(request: Request, max_bytes: int) -> bytes | None:
    if (read := request.scope.pop(_READ, None)) is not None:
        return read if len(read) <= max_bytes else None
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            return None
    return bytes(data)


HEADER: Final = "X-Llamaclust-Ignored"
STRICT_HEADER: Final = "X-Llamaclust-Strict"
_YES: Final = ("1", "true", "yes")
_MOST_LOGGED: Final = 256
_MOST_CHARACTERS: Final = 160
_MOST_OF_A_HEADER: Final = 3072
"""Maximum length of the header X-Llamaclust-Ignored. Some proxies accept at most 4 KiB for all headers of a reply."""
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.$:/\[\]-]")

_log = logging.getLogger(__name__)
_is_strict: ContextVar[bool] = ContextVar("is_strict", default=False)
"""True to refuse the current request if any of its fields has no effect."""


class IgnoredFields:
    """Middleware that lists a request's ignored fields in the reply's header X-Llamaclust-Ignored, and logs them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._logged: set[tuple[str, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields: list[str] = []

        async def name_fields(message: Message) -> None:
            if fields and message["type"] == "http.response.start":
                names = [*dict.fromkeys(_UNSAFE.sub("?", name)[:_MOST_CHARACTERS] or "?" for name in fields)]
                MutableHeaders(scope=message)[HEADER] = _listed(names)
                self._report(scope["path"], names)
            await send(message)

        ignored_parts.set(fields)
        _is_strict.set(Headers(scope=scope).get(STRICT_HEADER, "").lower() in _YES)
        await self._app(scope, receive, name_fields)

    def _report(self, path: str, fields: Sequence[str]) -> None:
        new = [field for field in fields if (path, field) not in self._logged]
        if new and len(self._logged) < _MOST_LOGGED:
            self._logged.update((path, field) for field in new)
            _log.info("%s: fields without effect: %s", path, _listed(new))


def _listed(names: Sequence[str]) -> str:
    shown = bisect_right([*accumulate(len(name) + 2 for name in names)], _MOST_OF_A_HEADER)
    more = [f"and {len(names) - shown} more"] if shown < len(names) else []
    return ", ".join([*names[:shown], *more])
