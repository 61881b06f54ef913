"""The paths of llama.cpp's own endpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from llamaclust.cluster.front.dialects.llamacpp.adapters import AdapterList, AllScales
from llamaclust.cluster.front.dialects.llamacpp.endpoints import LlamaCppEndpoints
from llamaclust.cluster.front.dialects.llamacpp.schema import (
    DetokenizeBody,
    InfillBody,
    LlamaCppBody,
    TemplateBody,
    TokenizeBody,
)
from llamaclust.cluster.front.dialects.llamacpp.slot_schema import SlotBody
from llamaclust.cluster.front.dialects.llamacpp.slots import SlotActions
from llamaclust.cluster.front.http.error_responses import unsupported
from llamaclust.cluster.front.http.paths import Route
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.text.service import TextService

_NO_SLOTS: Final = "no folder for slots is set: name one as `api.slot_folder` in the cluster file"


def llamacpp_routes(service: TextService, replies: Replies) -> Iterator[Route]:
    endpoints = LlamaCppEndpoints(service, replies.settings)
    yield Route("POST", "/completion", replies.endpoint("/completion", endpoints.complete), LlamaCppBody, computes=True)
    yield Route("POST", "/infill", replies.endpoint("/infill", endpoints.infill), InfillBody, computes=True)
    yield Route("POST", "/tokenize", endpoints.tokenize, TokenizeBody)
    yield Route("POST", "/detokenize", endpoints.detokenize, DetokenizeBody)
    yield Route("POST", "/apply-template", endpoints.apply_template, TemplateBody)
    adapters = AdapterList(replies.settings)
    yield Route("GET", "/lora-adapters", adapters.list)
    yield Route("POST", "/lora-adapters", adapters.set, AllScales)
    folder = replies.settings.slot_folder
    act = unsupported(_NO_SLOTS) if folder is None else SlotActions(service, replies.settings, folder).act
    yield Route("POST", "/slots/{slot}", act, SlotBody)
