"""llama.cpp's endpoints `/completion`, `/completions` and `/infill`: request bodies, and the JSON of replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Final

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.body import converted, has_field
from llamaclust.cluster.front.dialects.dialect import Dialect, ParsedRequest
from llamaclust.cluster.front.dialects.openai.endpoints import TextCompletions
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.foreign_fields import LLAMACPP
from llamaclust.cluster.front.images.chat_images import checked_bytes
from llamaclust.cluster.front.images.parts import base64_part, placed
from llamaclust.cluster.front.json_text import shown_progress, shown_timings
from llamaclust.cluster.front.models import ApiModel
from llamaclust.cluster.front.replies.reply import Event, Reply, View
from llamaclust.cluster.front.schema import (
    MAX_PROMPTS,
    Prompt,
    StopField,
    WholeLimitField,
    is_int,
    is_token_id,
    prompt_string,
    takes_images,
)
from llamaclust.cluster.front.shared_fields import (
    AdapterFields,
    Requested,
    SaltFields,
    SamplerFields,
    SlotFields,
    SpeculativeFields,
    sampled,
)
from llamaclust.cluster.front.structured_output import GrammarFields
from llamaclust.cluster.front.text.answer import TextChunk, row_entry
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem, Timed
from llamaclust.cluster.front.text.images import PromptImages, media_marker, source_of
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import TOKENIZING, run_on
from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest, PromptProgress
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.limits import MAX_TOP_LOGPROBS, AdapterScales
from llamaclust.core.sampler import bounds, fields
from llamaclust.model.tokenizers.gaps import Gap, OtherFile

_RANDOM_SEEDS: Final = (-1, 0xFFFFFFFF)
_NEVER: Final = -1e9
"""The logit bias of a token that must never be chosen. Requests write this bias as false."""
_MAX_FILES: Final = 1024
_GAP: Final = {"input_prefix", "input_suffix", "input_extra"}
_INPUTS: Final = {"model", "prompt", "return_tokens", "speculative", "cache_salt", *_GAP}
"""Fields of the request that the reply's `generation_settings` does not repeat."""


@dataclass(frozen=True, slots=True)
class MarkedPrompt:
    """A prompt with images. `texts` has one item more than `images`, because a text precedes and follows each image."""

    texts: tuple[str, ...]
    images: tuple[dict[str, Any], ...]


LlamaCppPrompt = str | tuple[str | int, ...] | MarkedPrompt


def _prompts(value: Any, info: ValidationInfo) -> tuple[LlamaCppPrompt, ...]:
    """Reads one prompt or a list of prompts. A list that contains token ids is one prompt. Raises ValueError."""
    if not isinstance(value, list) or not value or any(map(is_int, value)):
        return (_prompt(value, info.context),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts in one request; the limit is {MAX_PROMPTS}")
    return tuple(_prompt(prompt, info.context) for prompt in value)


def _prompt(value: Any, context: object) -> LlamaCppPrompt:
    if isinstance(value, dict) and value.get("multimodal_data") and takes_images(context):
        return _marked_prompt(value, context)
    if isinstance(value, dict):
        return prompt_string(value)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) or is_int(item) for item in value):
        raise ValueError("must be one prompt (a string, or a list of token ids and strings) or a list of prompts")
    return tuple(value)


def _marked_prompt(value: dict[str, Any], context: object) -> MarkedPrompt:
    """Reads {"prompt_string": ..., "multimodal_data": [...]}. The string has a media marker for each image."""
    data, text = value["multimodal_data"], value.get("prompt_string")
    if not isinstance(text, str) or not isinstance(data, list) or len(value) > 2:
        raise ValueError("an object must have a text `prompt_string`, a list `multimodal_data` and no other fields")
    texts = text.split(media_marker(text, len(data)))
    if len(texts) != len(data) + 1:
        found = f"has {len(texts) - 1} media markers for {len(data)} images"
        raise ValueError(f"{found}; for each image, put the `media_marker` from GET /props in `prompt_string`")
    parts = [placed(f".multimodal_data[{at}]", base64_part, "image", each, context) for at, each in enumerate(data)]
    return MarkedPrompt(tuple(texts), tuple(part for part in parts if isinstance(part, dict)))


def _biases(value: Any) -> tuple[tuple[int | str, float], ...]:
    """Reads [[token id or text, bias or false], ...] or {"token id or text": bias or false}. Raises ValueError."""
    if isinstance(value, dict):
        value = [[int(key) if is_token_id(key) else key, bias] for key, bias in value.items()]
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError("must be [[token, bias], ...] or {token: bias, ...}")
    return tuple(_token_bias(*pair) for pair in value)


def _token_bias(token: Any, bias: Any) -> tuple[int | str, float]:
    if not is_int(token) and not isinstance(token, str):
        raise ValueError("a token must be an id or a text")
    if bias is False:
        return token, _NEVER
    if not isinstance(bias, int | float) or bias is True or not _NEVER <= bias <= -_NEVER:
        raise ValueError("a bias must be a number, or false to never choose the token")
    return token, float(bias)


_OBJECT = {
    "type": "object",
    "required": ["prompt_string"],
    "properties": {
        "prompt_string": {"type": "string"},
        "multimodal_data": {"type": "array", "items": {"type": "string"}},
    },
}
_MIXED: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "integer"]}}, _OBJECT]
}
_PROMPTS = {"anyOf": [*_MIXED["anyOf"], {"type": "array", "items": _MIXED}]}
_PAIRS = {"anyOf": [{"type": "array", "items": {"type": "array"}}, {"type": "object"}]}


@sampled(fields.Dialect.LLAMACPP)
class LlamaCppBody(
    SamplerFields, GrammarFields, AdapterFields, SlotFields, SpeculativeFields, SaltFields, foreign=LLAMACPP
):
    takes_recommended: ClassVar = True

    model: str | None = None
    """Name of the model or of an adapter. Any other name selects the model, unless `api.strict_model` is true."""
    prompt: Annotated[tuple[Any, ...], BeforeValidator(_prompts), WithJsonSchema(_PROMPTS)]
    """One prompt (text, token ids, or a list of both), or a list of prompts. A model that reads images also accepts an
    object with a text `prompt_string`, which has a media marker for each image in `multimodal_data` (base64)."""
    n_predict: WholeLimitField = -1
    """The maximum number of tokens in the answer, or -1 for as many as fit into the context."""
    logit_bias: Annotated[tuple[Any, ...], BeforeValidator(_biases), WithJsonSchema(_PAIRS)] = ()
    """Biases to add to logits, as [[token id or text, bias], ...]. A token with the bias false is never chosen."""
    seed: int = -1
    """Seed of the random numbers, or -1 for a random seed."""
    stop: Annotated[StopField, Requested()] = ()
    """Texts that end the answer. The answer ends before the first occurrence of any of them."""
    ignore_eos: Annotated[bool, Requested()] = False
    """True to prevent the model from ending its answer."""
    n_probs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Requested("top_logprobs")] = 0
    """The number of likeliest tokens to show for each token of the answer, with logprobs. 0 shows no logprobs."""
    return_tokens: bool = False
    """True to show token ids in the reply. A stream's events always show them."""
    timings_per_token: bool = False
    """True to show timings in each event of a stream."""
    return_progress: bool = False
    """True to begin a stream with events that show how many prompt tokens are computed so far."""
    stream: bool = False
    """True to send the answer as server-sent events."""

    def check(self) -> None:
        images = (image for prompt in self.prompt if isinstance(prompt, MarkedPrompt) for image in prompt.images)
        checked_bytes([image["image_url"]["url"] for image in images], "prompt")

    async def prompts(self, service: TextService) -> list[Prompt | PromptImages]:
        return [await _tokenized(service, prompt) for prompt in self.prompt]

    @property
    def max_new_tokens(self) -> int | None:
        return None if self.n_predict < 0 else self.n_predict

    def request(
        self, prompt: Prompt | PromptImages, biases: tuple[tuple[int, float], ...], adapters: AdapterScales
    ) -> CompletionRequest:
        return self.completion(
            prompt,
            self.max_new_tokens,
            self.params(biases),
            seed=None if self.seed in _RANDOM_SEEDS else self.seed,
            grammar=self.answer_grammar(),
            with_logprobs=self.n_probs > 0,
            adapters=adapters,
            slot=self.slot,
        )


async def _tokenized(service: TextService, prompt: LlamaCppPrompt) -> Prompt | PromptImages:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, MarkedPrompt):
        first, *others = map(tuple, await service.tokenize_all(prompt.texts, "prompt", add_special=True))
        images = [await run_on(TOKENIZING, source_of, part, {}) for part in prompt.images]
        return PromptImages((first, *(piece for pair in zip(images, others, strict=True) for piece in pair)))
    return tuple(chain(*await service.tokenize_all(prompt, "prompt", add_special=True)))


def _begun(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return (value,)


def _files(value: Any) -> tuple[OtherFile, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of objects with 'filename' and 'text'")
    if len(value) > _MAX_FILES:
        raise ValueError(f"{len(value)} files in one request; the limit is {_MAX_FILES}")
    return tuple(map(_file, value))


def _file(value: Any) -> OtherFile:
    name, text = (value.get("filename", "tmp"), value.get("text")) if isinstance(value, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError("a file must be an object with a string 'text' and optionally a string 'filename'")
    return OtherFile(name, text)


_FILES = {"type": "array", "items": {"type": "object", "required": ["text"]}}


class InfillBody(LlamaCppBody):
    prompt: Annotated[tuple[Any, ...], BeforeValidator(_begun), WithJsonSchema({"type": "string"})] = Field(
        default_factory=lambda: ("",)
    )
    """The beginning of the text that fills the gap. The answer continues this text."""
    input_prefix: str
    """The text before the gap that the answer fills."""
    input_suffix: str
    """The text after the gap that the answer fills."""
    input_extra: Annotated[tuple[Any, ...], BeforeValidator(_files), WithJsonSchema(_FILES)] = ()
    """Other files for context. If not all of them fit into the context, the model gets only the last files."""

    async def prompts(self, service: TextService) -> list[Prompt | PromptImages]:
        gap = Gap(self.input_prefix, self.input_suffix, self.prompt[0], self.input_extra)
        return [await service.fill_in(gap, self.max_new_tokens)]


class LlamaCppCompletion(Dialect[LlamaCppBody]):
    paths = ("/completion",)
    body: type[LlamaCppBody] = LlamaCppBody

    def sequences(self, body: LlamaCppBody) -> int:
        return 0 if body.max_new_tokens == 0 else len(body.prompt)

    async def reply(self, parsed: ParsedRequest[LlamaCppBody]) -> Reply:
        body = parsed.body
        return Reply(
            service=self.service,
            requests=partial(self._requests, body, parsed.adapters),
            view=partial(LlamaCppView, self.service, body),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            has_measurements=len(body.prompt) > 1 or body.timings_per_token or body.return_progress,
            repeated=body,
        )

    async def _requests(self, body: LlamaCppBody, adapters: AdapterScales) -> list[CompletionRequest]:
        biases = await self._biases(body.logit_bias)
        first, *others = await body.prompts(self.service)
        request = await converted(body, body.request, first, biases, adapters)
        return [request, *(replace(request, prompt=prompt) for prompt in others)]

    async def _biases(self, given: Sequence[tuple[int | str, float]]) -> tuple[tuple[int, float], ...]:
        """Returns pairs of a token id and a bias. A bias for a text applies to each token of the text."""
        tokens = [token for token, _ in given]
        ids = await self.service.tokenize_all(tokens, "logit_bias", bounds.MAX_LOGIT_BIASES) if tokens else []
        biases: dict[int, float] = {}
        for part, (_, bias) in zip(ids, given, strict=True):
            biases.update(dict.fromkeys(part, bias))
        return tuple(sorted(biases.items()))


class Infill(LlamaCppCompletion):
    paths = ("/infill",)
    body = InfillBody

    async def make(self, data: bytes, context: RequestContext) -> Reply:
        if self.service.tokenizer.vocabulary.fill_in is None:
            message = "/infill: the model does not support infill: it has no tokens that mark prefix, suffix and middle"
            raise HttpError(501, "not_supported", message)
        return await super().make(data, context)


class Completions(TextCompletions):
    """Serves `/completions`: OpenAI's API if the request has the field `model`, and otherwise llama.cpp's API."""

    paths = ("/completions",)

    def __init__(self, model: ApiModel, path: str) -> None:
        super().__init__(model, path)
        self._llamacpp = LlamaCppCompletion(model, *LlamaCppCompletion.paths)

    async def make(self, data: bytes, context: RequestContext) -> Reply:
        if await has_field(data, "model"):
            return await super().make(data, context)
        return await self._llamacpp.make(data, context)


class LlamaCppView(View):
    def __init__(self, service: TextService, body: LlamaCppBody, log: AnswerLog) -> None:
        generations = log.generations  # All generations have the same settings.
        shown = cache(lambda: _shown_settings(service, body, generations[0]))
        self._answers = [_AnswerView(service, body, place, one, shown) for place, one in enumerate(generations)]

    def frames(self, prompt: int, item: LogItem) -> list[Event]:
        answer = self._answers[prompt]
        # Progress events have their own slot, because their number may change if the reply is computed again.
        if isinstance(item, PromptProgress):
            return [Event(len(self._answers) + 1, answer.progress(item))]
        return [Event(prompt, answer.part(item))]

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        shown = [view.part(answer, is_whole=True) for view, (answer,) in zip(self._answers, parts, strict=True)]
        return shown[0] if len(shown) == 1 else shown


@dataclass(slots=True, eq=False)
class _AnswerView:
    _service: TextService
    _body: LlamaCppBody
    _index: int
    _generation: GenerationRequest
    _settings: Callable[[], dict[str, Any]]
    _predicted: int = 0
    _has_new_line: bool = False

    def part(self, part: TextChunk, *, is_whole: bool = False) -> dict[str, Any]:
        self._predicted += len(part.rows)
        self._has_new_line |= "\n" in part.text
        with_tokens = self._body.return_tokens or not is_whole
        more = self._running(part) if part.finish_reason is None else self._end(part)
        if self._body.n_probs and (is_whole or part.finish_reason is None):
            more["completion_probabilities"] = (row_entry(self._service.tokenizer, row) for row in part.rows)
        return self._shown(part.text, part.token_ids if with_tokens else (), more)

    def progress(self, progress: PromptProgress) -> dict[str, Any]:
        more = shown_progress(progress, with_timings=self._body.timings_per_token)
        return self._shown("", (), {**self._counts(0), "stop": False, **more})

    def _shown(self, text: str, tokens: Sequence[int], more: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "content": text, "tokens": tokens, **more}

    def _running(self, part: TextChunk) -> dict[str, Any]:
        shown = {**self._counts(self._predicted), "stop": False}
        if self._body.timings_per_token and part.timings is not None:
            shown["timings"] = shown_timings(part.timings)
        return shown

    def _end(self, part: TextChunk) -> dict[str, Any]:
        assert part.timings is not None
        word, stop_type = (part.stopped_by, "word") if isinstance(part.stopped_by, str) else ("", "eos")
        return {
            **self._counts(self._predicted),
            "stop": True,
            "model": self._service.settings.model_name,
            "stop_type": "limit" if part.finish_reason is FinishReason.LENGTH else stop_type,
            "stopping_word": word,
            "truncated": False,
            "has_new_line": self._has_new_line,
            "tokens_cached": part.timings.cached_tokens,
            "generation_settings": self._settings(),
            "timings": shown_timings(part.timings),
        }

    def _counts(self, predicted: int) -> dict[str, Any]:
        slot, evaluated = self._body.slot or 0, len(self._generation.prompt)
        return {"id_slot": slot, "tokens_predicted": predicted, "tokens_evaluated": evaluated}


def _shown_settings(service: TextService, body: LlamaCppBody, generation: GenerationRequest) -> dict[str, Any]:
    """Returns the reply's `generation_settings`. A bias of null means that the token is never chosen."""
    most, wanted = service.settings.max_drafted, body.speculative
    biases: dict[int, float | None] = dict(generation.params.logit_bias)
    if body.ignore_eos:
        biases |= dict.fromkeys(service.tokenizer.end_of_generation)
    return {
        **body.model_dump(exclude=_INPUTS),
        "lora": [{"id": number, "scale": scale} for number, scale in generation.adapters],
        "logit_bias": [
            {"token": token, "bias": None if bias == _NEVER else bias} for token, bias in sorted(biases.items())
        ],
        "seed": generation.seed,
        "speculative.n_max": most if wanted is None else min(most, wanted),
        "n_ctx": service.settings.context_length,
    }
