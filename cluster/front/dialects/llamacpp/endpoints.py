"""llama.cpp's endpoints that generate no text: tokenization, chat templates, adapters, server properties, metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BeforeValidator, FailFast, Field, RootModel, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.body import LARGE_BYTES, converted, parse_json, read_body, read_bytes
from llamaclust.cluster.front.dialects.llamacpp.completions import LlamaCppBody
from llamaclust.cluster.front.dialects.llamacpp.slots import SlotActions, SlotBody
from llamaclust.cluster.front.dialects.openai.schema import ChatFields
from llamaclust.cluster.front.dialects.openai.view import FINGERPRINT
from llamaclust.cluster.front.foreign_fields import TEXT_ONLY
from llamaclust.cluster.front.http.gates import require_first_key
from llamaclust.cluster.front.http.responses import JsonResponse, QueryParameter, Route, unsupported
from llamaclust.cluster.front.http.sse import rendered, unless_disconnected
from llamaclust.cluster.front.images.urls import ImageRules
from llamaclust.cluster.front.schema import Body, read_fields
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.shared_fields import SCALES_SCHEMA, AdapterFields, read_scales
from llamaclust.cluster.front.text.images import MEDIA_MARKER
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import TOKENIZING, run_on, tokenizing
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales
from llamaclust.model.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine
    from llamaclust.cluster.front.models import ApiModel

_MAX_TOKENIZED_BYTES: Final = 1 << 20
_MAX_PIECES: Final = 1 << 16
_BLOCKING_CHARACTERS: Final = 2048
"""The maximum number of characters to tokenize on the event loop. Longer texts are tokenized on a thread."""
_NO_SLOTS: Final = "no folder for slots is set: set `api.slot_folder` in the cluster file"

_log = logging.getLogger(__name__)


def llamacpp_routes(service: TextService, settings: ApiSettings) -> Iterator[Route]:
    texts, adapters = TextEndpoints(service, settings), AdapterList(settings)
    slots = None if settings.slot_folder is None else SlotActions(service, settings, settings.slot_folder)
    yield Route("POST", "/tokenize", texts.tokenize, TokenizeBody)
    yield Route("POST", "/detokenize", texts.detokenize, DetokenizeBody)
    yield Route("POST", "/apply-template", texts.apply_template, TemplateBody)
    yield Route("GET", "/lora-adapters", adapters.list)
    yield Route("POST", "/lora-adapters", adapters.set, AllScales)
    act = unsupported(_NO_SLOTS) if slots is None else slots.act
    action = QueryParameter("action", "string", "save, restore or erase")
    yield Route("POST", "/slots/{slot}", act, SlotBody, query=(action,))


def _text(value: Any) -> Any:
    if isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) > _MAX_TOKENIZED_BYTES:
        raise ValueError(f"the text has more than {_MAX_TOKENIZED_BYTES} bytes; send it in several requests")
    return value


class TokenizeBody(Body, foreign=TEXT_ONLY):
    content: Annotated[str, BeforeValidator(_text)]
    """The text to tokenize, at most 1 MiB in UTF-8."""
    add_special: bool = False
    """True to add BOS and EOS if the model's tokenizer uses them."""
    parse_special: bool = True
    """True to read texts such as `<s>` as special tokens."""
    with_pieces: bool = False
    """True to show each token's text next to its id."""


class DetokenizeBody(Body, foreign=TEXT_ONLY):
    tokens: Annotated[list[int], FailFast(), Field(max_length=1 << 20)]


class TemplateBody(ChatFields, foreign=TEXT_ONLY):
    def check(self) -> None:
        self.choice.check()

    def request(self) -> ChatRequest:
        return ChatRequest(
            self.variables,
            tools=self.choice.offered,
            variables=self.template_variables,
            end=self.prompt_end,
            tool_use=self.choice.use,
            thoughts=self.thoughts(self),
        )


class TextEndpoints:
    def __init__(self, service: TextService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeBody, self._settings)
        if len(body.content) <= _BLOCKING_CHARACTERS:
            return self._tokenized(body)
        return await unless_disconnected(request, run_on(tokenizing(len(body.content)), self._tokenized, body))

    def _tokenized(self, body: TokenizeBody) -> Response:
        tokenizer = self._service.tokenizer
        ids = tokenizer.encode(body.content, body.add_special, body.parse_special)
        if body.with_pieces and len(ids) > _MAX_PIECES:
            reason = f"the text has {len(ids)} tokens; the limit with pieces is {_MAX_PIECES}; send less text"
            raise ParameterError("with_pieces", reason)
        return JsonResponse({"tokens": [_piece(tokenizer, token) for token in ids] if body.with_pieces else ids})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, self._settings)
        detokenizing = run_on(TOKENIZING, self._service.tokenizer.decode, body.tokens)
        return rendered({"content": await unless_disconnected(request, detokenizing)})

    async def apply_template(self, request: Request) -> Response:
        rules = None if self._service.vision is None else ImageRules(self._settings.image_hosts)
        body = await read_body(request, TemplateBody, self._settings, rules)
        rendering = self._service.chat_text(await converted(body, body.request))
        return rendered({"prompt": await unless_disconnected(request, rendering)})


def _piece(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


class AllScales(RootModel[Annotated[AdapterScales, BeforeValidator(read_scales), WithJsonSchema(SCALES_SCHEMA)]]):
    """The body of `POST /lora-adapters`."""


class AdapterList:
    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings

    async def list(self, request: Request) -> Response:
        adapters = self._settings.adapters
        scales = dict(adapters.default)
        return JsonResponse(
            [
                {"id": number, "name": adapter.name, "path": Path(adapter.path).name, "scale": scales.get(number, 0.0)}
                for number, adapter in adapters.numbered
            ]
        )

    async def set(self, request: Request) -> Response:
        """Sets the adapters' default scales. Adapters that the body does not list get scale 0. If API keys are set, the
        request must have the first key."""
        require_first_key(request.headers, self._settings, "set the default scales of adapters")
        value = parse_json(await read_bytes(request, self._settings, LARGE_BYTES))
        given = read_fields(AdapterFields, {"lora": {} if value is None else value}).lora or ()
        adapters = self._settings.adapters
        check_adapters(given, adapters.numbers)
        scales = tuple((number, scale) for number, scale in given if scale)
        if scales != adapters.default:
            adapters.default = scales
            shown = ", ".join(f"{number} {adapters[number].name!r}: {scale:g}" for number, scale in scales)
            _log.info("a client set the default scales of adapters: %s", shown or "all 0")
        return JsonResponse({"success": True})


def server_properties(models: Sequence[ApiModel], model: ApiModel) -> dict[str, Any]:
    """Returns the JSON of `GET /props`, with the fields of llama.cpp's router if models can be unloaded."""
    settings, tokenizer, template = model.service.settings, model.service.tokenizer, model.service.chat_template
    api = models[0].settings
    has_vision = model.service.vision is not None
    params = LlamaCppBody.model_validate({"prompt": ""}).model_dump(exclude={"prompt"})
    shown = {
        "default_generation_settings": {
            "n_ctx": settings.context_length,
            "speculative": settings.max_drafted > 0,
            "is_processing": False,
            "params": {**params, **settings.recommended, **api.defaults},
        },
        "context": settings.context.text,
        "total_slots": settings.max_sequences,
        "model_path": settings.model_path or settings.model_name,
        "model_alias": settings.model_name,
        "chat_template": template.source or "",
        **{f"chat_template_{name}": named.source for name, named in template.named.items()},
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
        "eos_token": "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
        "modalities": {"vision": has_vision, "audio": False},
        "build_info": FINGERPRINT,
        "is_sleeping": api.can_unload and model.lifecycle.is_asleep,
        **({"media_marker": MEDIA_MARKER} if has_vision else {}),
    }
    if api.can_unload:
        most = api.max_loaded_models or len(models)
        shown |= {"role": "router", "max_instances": most, "models_autoload": api.load_on_demand}
    return shown


def slot_list(model: ApiModel) -> list[dict[str, Any]]:
    """Returns the JSON of `GET /slots`: one slot per sequence that can run concurrently. Busy slots come first."""
    settings, running = model.service.settings, model.engine.counts.running
    shared = {"n_ctx": settings.context_length, "speculative": settings.max_drafted > 0}
    return [{"id": slot, **shared, "is_processing": slot < running} for slot in range(settings.max_sequences)]


_Metric = tuple[str, str, str, float]
"""A metric as (type, name, help text, value)."""


def llamacpp_metrics(engines: Mapping[str, Engine]) -> bytes:
    """Returns llama.cpp's metrics in Prometheus's text format."""
    labels = [f'{{model="{_escaped(model)}"}}' if len(engines) > 1 else "" for model in engines]
    families = zip(*map(_metrics, engines.values()), strict=True)
    return "".join(_family(metrics, labels) for metrics in families).encode()


def _family(metrics: Sequence[_Metric], labels: Sequence[str]) -> str:
    kind, name, text, _ = metrics[0]
    lines = [f"llamacpp:{name}{label} {value}\n" for label, (*_, value) in zip(labels, metrics, strict=True)]
    return f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\n{''.join(lines)}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _metrics(engine: Engine) -> list[_Metric]:
    counts, metrics, speed = engine.counts, engine.metrics, engine.metrics.speed()
    stages, sums, drafts = metrics.stage_report(), metrics.sums, metrics.drafts
    ttft_s, token_s = (speed.ttft_ms or 0) / 1e3, (speed.token_ms or 0) / 1e3
    prompt_rate = (speed.prompt_tokens or 0) / ttft_s if ttft_s else 0
    microbatches = stages[0].microbatches if stages else 0
    prompt_text = "Median prompt tokens per second until a request's first token"
    counter, gauge = "counter", "gauge"
    return [
        (counter, "prompt_tokens_total", "Number of prompt tokens computed", counts.computed_tokens),
        (counter, "prompt_tokens_cached_total", "Number of prompt tokens from the prefix cache", counts.cached_tokens),
        (counter, "prompt_seconds_total", "Seconds of ended requests until the first token", sums.prompt_s),
        (counter, "tokens_predicted_total", "Number of generated tokens", metrics.generated_tokens),
        (counter, "tokens_predicted_seconds_total", "Seconds of ended requests after the first token", sums.answer_s),
        (counter, "n_decode_total", "Number of microbatches of the first stage since the current plan", microbatches),
        (counter, "n_tokens_max", "Maximum number of tokens in a request and its answer", sums.most_tokens),
        (counter, "spec_decode_num_draft_tokens_total", "Number of drafted tokens computed", drafts.drafted),
        (counter, "spec_decode_num_accepted_tokens_total", "Number of drafted tokens accepted", drafts.accepted),
        (counter, "spec_decode_num_drafts_total", "Number of drafts computed", drafts.drafts),
        (gauge, "prompt_tokens_seconds", prompt_text, prompt_rate),
        (gauge, "predicted_tokens_seconds", "Median generated tokens per second", 1 / token_s if token_s else 0),
        (gauge, "requests_processing", "Number of running sequences", counts.running),
        (gauge, "requests_deferred", "Number of waiting sequences", counts.waiting),
        (gauge, "n_busy_slots_per_decode", "Mean rows of a microbatch in the first stage", metrics.mean_rows),
    ]
