"""llama.cpp's `POST /slots/ID`, which saves a slot's tokens to a file, restores the tokens, or erases them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from array import array
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_body, read_bytes
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.schema import Body
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.slots import SlotTokens
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.core import regular_file
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.wire.rpc.deadlines import deadline

_TURN_S = 60.0
"""Maximum seconds to wait until no other request uses the slot files."""

_Value = TypeVar("_Value")


class SlotBody(Body):
    """The body of `POST /slots/ID?action=save` and `?action=restore`. `?action=erase` has no body."""

    filename: str = Field(min_length=1, max_length=128)
    """Name of the slot file. The folder is set by `api.slot_folder` in the cluster file."""
    model: str | None = None
    """Name of the slot's model, if several models are served."""


class SlotActions:
    def __init__(self, service: TextService, settings: ApiSettings, folder: Path) -> None:
        self._service = service
        self._settings = settings
        self._folder = SlotFolder(folder)
        self._disk, self._turn = DiskThread("slots"), asyncio.Lock()

    async def act(self, request: Request) -> Response:
        """Saves, restores or erases a slot, as the query parameter `action` says."""
        slot, action = self._slot(request.path_params["slot"]), request.query_params.get("action")
        begin = time.monotonic()
        if action == "erase":
            await read_bytes(request, self._settings)
            return JsonResponse({"id_slot": slot, "n_erased": self._service.slots.erase(slot)})
        if action not in ("save", "restore"):
            raise ParameterError("action", f"must be save, restore or erase, not {str(action)[:60]!r}")
        body = await read_body(request, SlotBody, self._settings)
        try:
            counts = await (self._save if action == "save" else self._restore)(request, slot, body.filename)
        except OSError as error:
            message = f"filename: {body.filename!r}: the slot cannot be {action}d: {error.strerror}"
            raise HttpError(500, "slot_file_error", message) from error
        timings = {f"{action}_ms": (time.monotonic() - begin) * 1e3}
        return JsonResponse({"id_slot": slot, "filename": body.filename, **counts, "timings": timings})

    async def _save(self, request: Request, slot: int, name: str) -> dict[str, int]:
        slots = self._service.slots
        tokens = slots.tokens(slot)
        if not tokens.tokens:
            raise ParameterError("id_slot", f"slot {slot} has no tokens: first send a request with this id_slot")
        written = await self._on_disk(lambda: self._folder.write(name, tokens, slots.model_id))
        return {"n_saved": len(tokens.tokens), "n_written": written}

    async def _restore(self, request: Request, slot: int, name: str) -> dict[str, int]:
        """Restores a slot's tokens from a file, and computes their KV blocks."""
        slots = self._service.slots
        tokens, size_bytes = await self._on_disk(lambda: self._folder.read(name, slots.model_id))
        await unless_disconnected(request, self._compute(tokens))
        slots.put(slot, tokens)
        return {"n_restored": len(tokens.tokens), "n_read": size_bytes}

    async def _on_disk(self, work: Callable[[], _Value]) -> _Value:
        """Runs `work` on a thread while no other request uses slot files. Raises TimeoutError or DeadlineError."""
        async with deadline("the slot files of other requests", _TURN_S):
            await self._turn.acquire()
        try:
            return await self._disk.call(work)
        finally:
            self._turn.release()

    async def _compute(self, tokens: SlotTokens) -> None:
        """Computes the tokens' KV blocks with a completion request that generates one token."""
        completion = CompletionRequest(
            tuple(tokens.tokens),
            1,
            SamplingParams(temperature=0.0),
            seed=0,
            cache_salt=tokens.cache_salt,
            adapters=tokens.adapters,
        )
        limit = deadline("computing the slot's tokens (timeouts.request)", self._settings.request_s)
        async with limit, await self._service.start(completion) as running:
            await running.log.wait_over()
            running.log.raise_error()

    def _slot(self, given: Any) -> int:
        count = self._service.slots.count
        if not given.isascii() or not given.isdigit() or len(given) > 9 or int(given) >= count:
            raise ParameterError(
                "id_slot", f"slot {given[:60]!r} does not exist: there are {count} slots, numbered from 0"
            )
        return int(given)


_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_FORMAT: Final = "llamaclust slot 1"
_BEGINNING: Final = b'{"format": "llamaclust slot '
_MOST_BYTES: Final = 4 * MAX_CONTEXT_TOKENS + (1 << 20)
_DIGEST_BYTES: Final = 32
_TOKEN: Final = np.dtype("<u4")
_FIELDS: Final = frozenset({"format", "model", "cache_salt", "adapters", "tokens"})
_MOST_FILES: Final = 1024
"""The maximum number of files in the folder. The limit keeps clients from filling the disk."""


class SlotFolder:
    """Slot files of all models, in one folder. The methods are blocking, so call them on a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, tokens: SlotTokens, model_id: str) -> int:
        """Writes a slot file and returns its size in bytes. Raises OSError or ParameterError."""
        path = self._path(name)
        if os.path.lexists(path):
            if not _is_slot_file(path):
                raise ParameterError("filename", f"{name!r} cannot be replaced: it is not a slot file")
        elif (files := sum(1 for _ in self._folder.iterdir())) >= _MOST_FILES:
            raise ParameterError("filename", f"the folder has {files} files; the limit is {_MOST_FILES}; delete files")
        data = _encode(tokens, model_id)
        regular_file.write_bytes(path, data)
        return len(data)

    def read(self, name: str, model_id: str) -> tuple[SlotTokens, int]:
        """Returns a file's tokens and size in bytes. Raises OSError, or ParameterError if the file cannot be used."""
        path = self._path(name)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ParameterError("filename", f"{name!r} cannot be restored: it is not a regular file")
        try:
            data = regular_file.read_bytes(path, _MOST_BYTES, follows_links=False)
            return _decode(data, model_id), len(data)
        except FileNotFoundError as error:
            raise ParameterError("filename", f"there is no file {name!r}") from error
        except ValueError as error:
            raise ParameterError("filename", f"{name!r} cannot be restored: {error}") from error

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            reason = "must be 1 to 128 letters, digits, dots, hyphens and underscores that do not begin with a dot"
            raise ParameterError("filename", reason)
        return self._folder / name


def _is_slot_file(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with regular_file.open_regular(path, follows_links=False) as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def _encode(tokens: SlotTokens, model_id: str) -> bytes:
    head = {
        "format": _FORMAT,
        "model": model_id,
        "cache_salt": tokens.cache_salt,
        "adapters": tokens.adapters,
        "tokens": len(tokens.tokens),
    }
    data = json.dumps(head).encode() + b"\n" + np.asarray(tokens.tokens).astype(_TOKEN).tobytes()
    return data + sha256(data).digest()


def _decode(data: bytes, model_id: str) -> SlotTokens:
    """Decodes a slot file. Raises ValueError if the file is damaged, or belongs to another program or model."""
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    head, _, ids = content.partition(b"\n")
    if sha256(content).digest() != digest or not head.startswith(_BEGINNING):
        raise ValueError("the file is damaged, or not a slot file of this program")
    fields: dict[str, Any] = json.loads(head)
    if fields.get("format") != _FORMAT:
        raise ValueError(f"the file's format is not {_FORMAT!r}")
    if fields.get("model") != model_id:
        raise ValueError("the file was saved for another model")
    count, rest = divmod(len(ids), _TOKEN.itemsize)
    if not count or rest or fields.keys() != _FIELDS or fields["tokens"] != count:
        raise ValueError("the file has too few or too many fields or tokens")
    tokens = array("I", np.frombuffer(ids, _TOKEN).astype(np.uint32).tobytes())
    try:
        adapters = tuple((int(number), float(scale)) for number, scale in fields["adapters"])
    except TypeError:
        raise ValueError("the file's adapters are not pairs of numbers") from None
    return SlotTokens(tokens, str(fields["cache_salt"]), adapters)
