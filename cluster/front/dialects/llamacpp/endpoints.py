"""The paths of llama.cpp's API, with its adapters, metrics, templates and token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BeforeValidator, RootModel, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.body import LARGE_BYTES, converted, parse_body, parse_json, read_body, read_bytes
from llamaclust.cluster.front.dialects.llamacpp.completions import (
    DetokenizeBody,
    InfillBody,
    LlamaCppBody,
    TemplateBody,
    TokenizeBody,
)
from llamaclust.cluster.front.dialects.llamacpp.reply import InfillRequests, LlamaCppRequests
from llamaclust.cluster.front.dialects.llamacpp.slots import SlotActions, SlotBody
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.gates import require_first_key
from llamaclust.cluster.front.http.responses import JsonResponse, QueryParameter, Route, unsupported
from llamaclust.cluster.front.http.sse import unless_disconnected
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.sampling import SCALES_SCHEMA, AdapterFields, read_scales
from llamaclust.cluster.front.schema import read_fields
from llamaclust.cluster.front.settings import ApiSettings, ModelNames
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import TOKENIZING, run_on, tokenizing
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class AllScales(RootModel[Annotated[AdapterScales, BeforeValidator(read_scales), WithJsonSchema(SCALES_SCHEMA)]]):
    """The body of `POST /lora-adapters`."""


class AdapterList:
    """The adapters that are there, with the scales that they have in requests that choose none."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings

    async def list(self, request: Request) -> Response:
        scales = dict(self._settings.adapters.default)
        return JsonResponse(
            [
                {"id": number, "name": adapter.name, "path": adapter.path, "scale": scales.get(number, 0.0)}
                for number, adapter in self._settings.adapters.numbered
            ]
        )

    async def set(self, request: Request) -> Response:
        """For requests that come from now on; adapters that are not listed get 0. Where there are keys, only the first
        one sets them, since they are of all clients."""
        require_first_key(request.headers, self._settings, "set the scales of adapters in requests that choose none")
        value = parse_json(await read_bytes(request, self._settings, LARGE_BYTES))
        scales = read_fields(AdapterFields, {"lora": {} if value is None else value}).lora or ()
        check_adapters(scales, self._settings.adapters.numbers)
        self._change(tuple((adapter, scale) for adapter, scale in scales if scale))
        return JsonResponse({"success": True})

    def _change(self, scales: AdapterScales) -> None:
        adapters = self._settings.adapters
        if scales == adapters.default:
            return
        adapters.default = scales
        shown = ", ".join(f"{number} {adapters[number].name!r}: {scale:g}" for number, scale in scales)
        _log.info("a client set the scales of adapters in requests that choose none: %s", shown or "all 0")


class _Metric(NamedTuple):
    name: str
    kind: str
    text: str
    value: float


def llamacpp_metrics(engines: Mapping[str, Engine]) -> bytes:
    """In Prometheus' text format, by hand: two of the counters have names that its library refuses. `engines`: by
    model, which is a label where there are several."""
    labels = [f'{{model="{_escaped(model)}"}}' if len(engines) > 1 else "" for model in engines]
    written = [(*_counters(engine), *_gauges(engine)) for engine in engines.values()]
    return "".join(_family(metrics, labels) for metrics in zip(*written, strict=True)).encode()


def _family(metrics: Sequence[_Metric], labels: Sequence[str]) -> str:
    """One metric of all models."""
    name, kind, text, _ = metrics[0]
    head = f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\n"
    return head + "".join(
        f"llamacpp:{name}{label} {metric.value}\n" for metric, label in zip(metrics, labels, strict=True)
    )


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _counters(engine: Engine) -> Iterator[_Metric]:
    counts, metrics = engine.counts, engine.metrics
    stages, sums, drafts = metrics.stage_report(), metrics.sums, metrics.drafts
    for name, text, value in (
        ("prompt_tokens_total", "Prompt tokens computed", counts.computed_tokens),
        ("prompt_tokens_cached_total", "Prompt tokens found in the prefix cache", counts.cached_tokens),
        ("prompt_seconds_total", "From start to first token, of ended requests", sums.prompt_s),
        ("tokens_predicted_total", "Tokens generated", metrics.generated_tokens),
        ("tokens_predicted_seconds_total", "From first token to last, of ended requests", sums.answer_s),
        ("n_decode_total", "Microbatches of the first stage since the plan", stages[0].microbatches if stages else 0),
        ("n_tokens_max", "Most tokens of a request, prompt and answer", sums.most_tokens),
        ("spec_decode_num_draft_tokens_total", "Drafted tokens computed", drafts.drafted),
        ("spec_decode_num_accepted_tokens_total", "Drafted tokens that were accepted", drafts.accepted),
        ("spec_decode_num_drafts_total", "Drafts computed", drafts.drafts),
    ):
        yield _Metric(name, "counter", text, value)


def _gauges(engine: Engine) -> Iterator[_Metric]:
    counts, speed = engine.counts, engine.metrics.speed()
    ttft_s, token_s = (speed.ttft_ms or 0) / 1e3, (speed.token_ms or 0) / 1e3
    prompt_rate = (speed.prompt_tokens or 0) / ttft_s if ttft_s else 0
    for name, text, value in (
        ("prompt_tokens_seconds", "Prompt tokens a second before the first token of a request, median", prompt_rate),
        ("predicted_tokens_seconds", "Tokens a second of a request, median", 1 / token_s if token_s else 0),
        ("requests_processing", "Sequences being computed", counts.running),
        ("requests_deferred", "Sequences that wait", counts.waiting),
        ("n_busy_slots_per_decode", "Rows of a microbatch of the first stage, mean", engine.metrics.mean_rows),
    ):
        yield _Metric(name, "gauge", text, value)


_MAX_PIECES = 1 << 16
_BLOCKING_CHARACTERS = 2048
"""Longer texts are tokenized on a thread."""


class LlamaCppEndpoints:
    """One served model under llama.cpp's names."""

    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings
        self._models = ModelNames(service.settings.model_name, settings, any_by_default=True)

    async def infill(self, data: bytes, context: RequestContext) -> Reply:
        tokens = self._service.tokenizer.vocabulary.fill_in
        if tokens is None:
            message = "/infill: the model has no tokens for a prefix, a suffix and a middle"
            raise HttpError(501, "not_supported", message)
        body = await parse_body(data, InfillBody, self._settings)
        adapters = self._models.adapters(body.model, body.lora, context.scales)
        return InfillRequests(self._service, body, adapters).reply()

    async def complete(self, data: bytes, context: RequestContext) -> Reply:
        body = await parse_body(data, LlamaCppBody, self._settings)
        adapters = self._models.adapters(body.model, body.lora, context.scales)
        return LlamaCppRequests(self._service, body, adapters).reply()

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeBody, self._settings)
        if len(body.content) <= _BLOCKING_CHARACTERS:
            return self._tokenized(body)
        return await unless_disconnected(request, run_on(tokenizing(len(body.content)), self._tokenized, body))

    def _tokenized(self, body: TokenizeBody) -> Response:
        """The whole reply: its ids take ten times as much memory as their JSON, and waiting replies keep the latter."""
        ids = self._service.tokenizer.encode(body.content, body.add_special, body.parse_special)
        if not body.with_pieces:
            return JsonResponse({"tokens": ids})
        if len(ids) > _MAX_PIECES:
            reason = f"the text has {len(ids)} tokens, at most {_MAX_PIECES} are shown as pieces; send less at once"
            raise ParameterError("with_pieces", reason)
        return JsonResponse({"tokens": [_piece_entry(self._service.tokenizer, token) for token in ids]})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, self._settings)
        detokenizing = run_on(TOKENIZING, self._service.tokenizer.decode, body.tokens)
        return JsonResponse({"content": await unless_disconnected(request, detokenizing)})

    async def apply_template(self, request: Request) -> Response:
        body = await read_body(request, TemplateBody, self._settings)
        rendering = self._service.chat_text(await converted(body, body.request))
        return JsonResponse({"prompt": await unless_disconnected(request, rendering)})


def _piece_entry(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token with its text, or its bytes where they are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


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
    action = QueryParameter("action", "string", "save, restore or erase")
    yield Route("POST", "/slots/{slot}", act, SlotBody, query=(action,))
