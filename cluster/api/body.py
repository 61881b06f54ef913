"""Request bodies: bounded, JSON, of known fields. What is not supported is refused by name, neutral fields dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.text_request import ParameterError

_DISCARD_S = 2.0
_BLOCKING_BYTES = 1 << 16
"""Larger bodies are looked through on a thread of their own."""

Neutral = Callable[[Any], bool]
"""Whether a value of a field asks for nothing that is not done anyway."""


class Body(BaseModel):
    """A request's fields, by their own names and types only. Null is the same as absent."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


_Body = TypeVar("_Body", bound=Body)


async def read_body(
    request: Request, kind: type[_Body], unsupported: Mapping[str, Neutral], settings: ApiSettings
) -> _Body:
    """The request's body. Raises HttpError (413, 408, 400) and ParameterError that names the field.

    `unsupported` are fields that other servers have: dropped where neutral, else refused.
    """
    data = await _read(request, settings)

    def parse() -> _Body:
        return validate(kind, without_neutral(parse_object(data), unsupported))

    return parse() if len(data) <= _BLOCKING_BYTES else await asyncio.to_thread(parse)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object, nested 200 levels deep at most."""
    try:
        payload = from_json(data)
    except ValueError as error:
        reason = "it is nested too deeply" if "recursion limit" in str(error) else str(error)
        raise HttpError(400, "invalid_json", f"the body is not valid JSON: {reason}") from error
    if not isinstance(payload, dict):
        raise HttpError(400, "invalid_json", "the body must be a JSON object")
    return payload


def without_neutral(payload: Mapping[str, Any], unsupported: Mapping[str, Neutral]) -> dict[str, Any]:
    """The fields that are to be obeyed. ParameterError for one that asks for what is not supported."""
    kept = {name: value for name, value in payload.items() if value is not None}
    for name in kept.keys() & unsupported.keys():
        if not unsupported[name](kept.pop(name)):
            raise ParameterError(name, "this server does not support it; leave it out")
    return kept


def validate(kind: type[_Body], fields: Mapping[str, Any]) -> _Body:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error, kind) from error


async def _read(request: Request, settings: ApiSettings) -> bytes:
    length = request.headers.get("content-length", "")
    too_large = length.isascii() and length.isdigit() and int(length[:18]) > settings.max_body_bytes
    try:
        async with asyncio.timeout(settings.body_s):
            data = None if too_large else await _read_all(request, settings.max_body_bytes)
    except TimeoutError:
        raise HttpError(408, "request_timeout", f"the body did not arrive within {settings.body_s:g} s") from None
    if data is None:
        await _discard(request)
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


async def _discard(request: Request) -> None:
    """Takes in what a client is still sending: to close the connection under it would lose the answer on its way."""
    if "expect" in request.headers:  # it waits for leave to send
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            async for _ in request.stream():
                pass


def _first_error(error: ValidationError, kind: type[Body]) -> ParameterError:
    """An unknown field comes before others, which may be missing because of it."""
    details = error.errors(include_url=False, include_input=False)
    first: Any = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    place: Sequence[str | int] = first["loc"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(place[-1]), list(kind.model_fields), 1)
        return ParameterError(name[:200], f"unknown field{f'; did you mean {near[0]!r}?' if near else ''}")
    if first["type"] == "value_error":
        return ParameterError(name, str(first["ctx"]["error"]))
    reason = "is missing" if first["type"] == "missing" else first["msg"][:1].lower() + first["msg"][1:]
    return ParameterError(name, reason)
