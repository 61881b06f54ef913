"""`POST /slots/ID?action=save|restore|erase`: a slot's tokens in files, and out of the prefix cache."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import read_body, read_bytes
from llamaclust.cluster.front.dialects.llamacpp.slot_files import SlotFolder
from llamaclust.cluster.front.dialects.llamacpp.slot_schema import SlotBody
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.error_responses import JsonResponse
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.schema import NOTHING_FOREIGN
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import collect
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.slots import SlotTokens
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling import SamplingParams


class SlotActions:
    """Saves slots in a folder, restores them from it, and erases them."""

    def __init__(self, service: TextService, settings: ApiSettings, folder: Path) -> None:
        self._service = service
        self._settings = settings
        self._folder = SlotFolder(folder)

    async def act(self, request: Request) -> Response:
        """What the query's `action` names."""
        slot, action = self._slot(request.path_params["slot"]), request.query_params.get("action")
        begin = time.monotonic()
        if action == "erase":
            await read_bytes(request, self._settings)
            return JsonResponse({"id_slot": slot, "n_erased": self._service.slots.erase(slot)})
        if action not in ("save", "restore"):
            raise ParameterError("action", f"must be save, restore or erase, is {str(action)[:60]!r}")
        body = await read_body(request, SlotBody, NOTHING_FOREIGN, self._settings)
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
            raise ParameterError("id_slot", f"slot {slot} has no tokens: no request has named it as its id_slot")
        written = await asyncio.to_thread(self._folder.write, name, tokens, slots.model_id)
        return {"n_saved": len(tokens.tokens), "n_written": written.size_bytes}

    async def _restore(self, request: Request, slot: int, name: str) -> dict[str, int]:
        """Computes the tokens' keys and values, or reads them from the workers' disks, so that requests find them."""
        slots = self._service.slots
        read = await asyncio.to_thread(self._folder.read, name, slots.model_id)
        await unless_disconnected(request, self._compute(read.tokens))
        slots.put(slot, read.tokens)
        return {"n_restored": len(read.tokens.tokens), "n_read": read.size_bytes}

    async def _compute(self, tokens: SlotTokens) -> None:
        """One token is chosen, since prompts without an answer are not computed."""
        completion = CompletionRequest(
            tuple(tokens.tokens),
            1,
            SamplingParams(temperature=0.0),
            seed=0,
            cache_salt=tokens.cache_salt,
            adapters=tokens.adapters,
        )
        async with await self._service.start(completion) as stream:
            await collect(stream)

    def _slot(self, given: Any) -> int:
        count = self._service.slots.count
        if not given.isascii() or not given.isdigit() or len(given) > 9 or int(given) >= count:
            raise ParameterError("id_slot", f"{given[:60]!r}, but there are {count} slots, numbered from 0")
        return int(given)
