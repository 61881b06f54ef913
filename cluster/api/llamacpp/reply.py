"""The reply to one `/completion`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Final

from llamaclust.cluster.api.body import converted
from llamaclust.cluster.api.fields.logprobs import row_entry
from llamaclust.cluster.api.fields.timings import shown_progress, shown_timings
from llamaclust.cluster.api.json_parts import is_large
from llamaclust.cluster.api.llamacpp.schema import NEVER, RANDOM_SEEDS, InfillBody, LlamaCppBody, LlamaCppPrompt
from llamaclust.cluster.api.replies.json_body import JsonBody, json_body
from llamaclust.cluster.api.replies.prompt_streams import PromptStreams
from llamaclust.cluster.api.replies.reply import Event
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.api.sse import event
from llamaclust.cluster.scheduler.requests import FinishReason, PromptProgress
from llamaclust.cluster.text.answer import Answer, TextChunk, collect_all
from llamaclust.cluster.text.budget import RowStorage
from llamaclust.cluster.text.fill_in import fill_in_prompt
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling_bounds import MAX_LOGIT_BIASES
from llamaclust.model.tokenizers.fill_in import FillInTokens

_INPUTS: Final = {"model", "prompt", "return_tokens", "speculative", "input_prefix", "input_suffix", "input_extra"}
"""Fields that are no settings of the generation."""


class LlamaCppReply:
    """One answer to each prompt. See `Reply`."""

    acknowledgement: bytes | None = None

    def __init__(
        self, service: TextService, settings: ApiSettings, ticket: Ticket, body: LlamaCppBody, adapters: AdapterScales
    ) -> None:
        self.is_streamed = body.stream
        self._adapters = adapters
        self._service = service
        self._settings = settings
        self._body = body
        self._prompts = PromptStreams(service, ticket, RowStorage.STREAMED if body.stream else RowStorage.PACKED)

    @property
    def has_measurements(self) -> bool:
        return self._body.timings_per_token or self._body.return_progress

    async def start(self) -> None:
        biases = await self._biases(self._body.logit_bias)
        first, *others = [await self._prompt(prompt) for prompt in self._body.prompt]
        request = await converted(self._body, self._request, first, biases)
        await self._prompts.submit([request, *(replace(request, prompt=prompt) for prompt in others)])

    async def wait_first(self) -> None:
        await self._prompts.streams[0].wait_first(self._settings.first_chunk_s)

    async def aclose(self) -> None:
        await self._prompts.aclose()

    async def whole(self) -> JsonBody:
        answers = [answers[0] for answers in await collect_all(self._prompts.streams)]
        return json_body(partial(self._whole, answers), is_large=is_large(sum(answer.entries for answer in answers)))

    def _whole(self, answers: Sequence[Answer]) -> Any:
        """A list where there are several prompts."""
        shown = [shape.whole(answer) for shape, answer in zip(self._shapes(), answers, strict=True)]
        return shown[0] if len(shown) == 1 else shown

    async def events(self) -> AsyncGenerator[Event | None, None]:
        shapes = self._shapes()
        read = self._prompts.chunks_and_progress if self._body.return_progress else self._prompts.chunks
        async for prompt, chunk in read(self._settings.keepalive_s):
            if chunk is None:
                yield None
            elif isinstance(chunk, PromptProgress):
                yield Event(self._prompts.choices + 1, event(shapes[prompt].progress(chunk)))
            else:
                yield Event(prompt, event(shapes[prompt].chunk(chunk)))

    def _shapes(self) -> list[_Shape]:
        streams = self._prompts.streams
        return [_Shape(self._service, self._body, stream, index) for index, stream in enumerate(streams)]

    def _request(self, prompt: str | tuple[int, ...], biases: tuple[tuple[int, float], ...]) -> CompletionRequest:
        body = self._body
        return CompletionRequest(
            prompt,
            body.max_new_tokens,
            body.params(biases),
            seed=None if body.seed in RANDOM_SEEDS else body.seed,
            stop=body.stop,
            ignore_eos=body.ignore_eos,
            top_logprobs=body.n_probs,
            penalty_window=body.penalty_window,
            penalize_nl=body.penalize_nl,
            dry_window=body.dry_window,
            dry_breakers=body.dry_sequence_breakers,
            grammar=body.answer_grammar(),
            with_logprobs=body.n_probs > 0,
            adapters=self._adapters,
            slot=body.slot,
            max_drafted=body.speculative,
        )

    async def _prompt(self, prompt: LlamaCppPrompt) -> str | tuple[int, ...]:
        if isinstance(prompt, str):
            return prompt
        return tuple(chain(*await self._service.tokenize_all(prompt, "prompt", add_special=True)))

    async def _biases(self, given: Sequence[tuple[int | str, float]]) -> tuple[tuple[int, float], ...]:
        """A text's bias goes to each of its tokens."""
        tokens = [token for token, _ in given]
        ids = await self._service.tokenize_all(tokens, "logit_bias", MAX_LOGIT_BIASES) if tokens else []
        biases: dict[int, float] = {}
        for part, (_, bias) in zip(ids, given, strict=True):
            biases.update(dict.fromkeys(part, bias))
        return tuple(sorted(biases.items()))


class InfillReply(LlamaCppReply):
    """One answer that fills a gap."""

    def __init__(
        self,
        service: TextService,
        settings: ApiSettings,
        ticket: Ticket,
        body: InfillBody,
        adapters: AdapterScales,
        *,
        tokens: FillInTokens,
    ) -> None:
        super().__init__(service, settings, ticket, body, adapters)
        self._gap = body.gap
        self._max_new_tokens = body.max_new_tokens
        self._tokens = tokens

    async def _prompt(self, prompt: LlamaCppPrompt) -> tuple[int, ...]:
        context = self._service.settings.context_length
        return await fill_in_prompt(self._service.tokenizer, self._tokens, self._gap, context, self._max_new_tokens)


class _Shape:
    """The answer to one prompt."""

    def __init__(self, service: TextService, body: LlamaCppBody, stream: CompletionStream, index: int) -> None:
        self._service = service
        self._body = body
        self._stream = stream
        self._index = index
        self._predicted = 0
        self._has_new_line = False

    def whole(self, answer: Answer) -> dict[str, Any]:
        tokens = answer.token_ids if self._body.return_tokens else ()
        return {
            "index": self._index,
            "content": answer.text,
            "tokens": tokens,
            **self._end(answer),
            **self._probabilities(answer),
        }

    def chunk(self, chunk: TextChunk) -> dict[str, Any]:
        """One event. The last has no tokens."""
        self._predicted += len(chunk.rows)
        self._has_new_line |= "\n" in chunk.text
        shown = {"index": self._index, "content": chunk.text, "tokens": chunk.token_ids}
        if chunk.finish_reason is not None:
            return {**shown, **self._end(chunk)}
        timings = {"timings": shown_timings(self._stream.timings())} if self._body.timings_per_token else {}
        return {**shown, **self._counts(self._predicted), "stop": False, **timings, **self._probabilities(chunk)}

    def progress(self, progress: PromptProgress) -> dict[str, Any]:
        """An event without text."""
        more = shown_progress(progress, with_timings=self._body.timings_per_token)
        return {"index": self._index, "content": "", "tokens": [], **self._counts(0), "stop": False, **more}

    def _end(self, part: TextChunk) -> dict[str, Any]:
        assert part.timings is not None
        predicted = len(part.rows) or self._predicted
        word = part.stopped_by if isinstance(part.stopped_by, str) else ""
        return {
            **self._counts(predicted),
            "stop": True,
            "model": self._service.settings.model_name,
            "stop_type": _stop_type(part),
            "stopping_word": word,
            "truncated": False,
            "has_new_line": self._has_new_line or "\n" in part.text,
            "tokens_cached": part.timings.cached_tokens,
            "generation_settings": self._settings(),
            "timings": shown_timings(part.timings),
        }

    def _counts(self, predicted: int) -> dict[str, int]:
        slot, evaluated = self._body.slot or 0, len(self._stream.generation.prompt)
        return {"id_slot": slot, "tokens_predicted": predicted, "tokens_evaluated": evaluated}

    def _probabilities(self, part: TextChunk) -> dict[str, Any]:
        if not self._body.n_probs:
            return {}
        return {"completion_probabilities": (row_entry(self._service.tokenizer, row) for row in part.rows)}

    def _settings(self) -> dict[str, Any]:
        fields = self._body.model_dump(exclude=_INPUTS)
        most, wanted = self._service.settings.max_drafted, self._body.speculative
        return {
            **fields,
            "lora": [{"id": number, "scale": scale} for number, scale in self._stream.generation.adapters],
            "logit_bias": self._shown_biases(),
            "seed": self._stream.generation.seed,
            "speculative.n_max": most if wanted is None else min(most, wanted),
            "n_ctx": self._service.settings.context_length,
        }

    def _shown_biases(self) -> list[dict[str, Any]]:
        """null: the token may not be chosen."""
        biases: dict[int, float | None] = dict(self._stream.generation.params.logit_bias)
        if self._body.ignore_eos:
            biases |= dict.fromkeys(self._service.tokenizer.end_of_generation)
        return [{"token": token, "bias": None if bias == NEVER else bias} for token, bias in sorted(biases.items())]


def _stop_type(part: TextChunk) -> str:
    if part.finish_reason is FinishReason.LENGTH:
        return "limit"
    return "word" if isinstance(part.stopped_by, str) else "eos"
