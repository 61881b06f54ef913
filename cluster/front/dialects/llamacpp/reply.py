"""The reply to one `/completion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Final

from llamaclust.cluster.front.body import converted
from llamaclust.cluster.front.dialects.llamacpp.completions import (
    NEVER,
    RANDOM_SEEDS,
    InfillBody,
    LlamaCppBody,
    LlamaCppPrompt,
)
from llamaclust.cluster.front.http.sse import event
from llamaclust.cluster.front.json_text import shown_progress, shown_timings
from llamaclust.cluster.front.replies.reply import Event, Reply, View
from llamaclust.cluster.front.sampling import row_entry
from llamaclust.cluster.front.schema import Prompt
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem, Timed
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest, PromptProgress
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling_bounds import MAX_LOGIT_BIASES

_INPUTS: Final = {"model", "prompt", "return_tokens", "speculative", "input_prefix", "input_suffix", "input_extra"}
"""Fields that are no settings of the generation."""


class LlamaCppRequests:
    """The completions of a body, one a prompt."""

    def __init__(self, service: TextService, body: LlamaCppBody, adapters: AdapterScales) -> None:
        self._service = service
        self._body = body
        self._adapters = adapters

    async def __call__(self) -> list[CompletionRequest]:
        """See `Requests`."""
        biases = await self._biases(self._body.logit_bias)
        first, *others = await self._prompts()
        request = await converted(self._body, self._request, first, biases)
        return [request, *(replace(request, prompt=prompt) for prompt in others)]

    def reply(self) -> Reply:
        """The reply with an answer to each."""
        body = self._body
        return Reply(
            service=self._service,
            requests=self,
            view=partial(LlamaCppView, self._service, body),
            is_streamed=body.stream,
            timed=Timed.ALWAYS if body.timings_per_token else Timed.NEVER,
            with_progress=body.return_progress,
            has_measurements=body.timings_per_token or body.return_progress,
        )

    async def _prompts(self) -> list[Prompt]:
        return [await self._tokenized(prompt) for prompt in self._body.prompt]

    async def _tokenized(self, prompt: LlamaCppPrompt) -> Prompt:
        if isinstance(prompt, str):
            return prompt
        return tuple(chain(*await self._service.tokenize_all(prompt, "prompt", add_special=True)))

    def _request(self, prompt: Prompt, biases: tuple[tuple[int, float], ...]) -> CompletionRequest:
        body = self._body
        return body.completion(
            prompt,
            body.max_new_tokens,
            body.params(biases),
            seed=None if body.seed in RANDOM_SEEDS else body.seed,
            grammar=body.answer_grammar(),
            with_logprobs=body.n_probs > 0,
            adapters=self._adapters,
            slot=body.slot,
        )

    async def _biases(self, given: Sequence[tuple[int | str, float]]) -> tuple[tuple[int, float], ...]:
        """A text's bias goes to each of its tokens."""
        tokens = [token for token, _ in given]
        ids = await self._service.tokenize_all(tokens, "logit_bias", MAX_LOGIT_BIASES) if tokens else []
        biases: dict[int, float] = {}
        for part, (_, bias) in zip(ids, given, strict=True):
            biases.update(dict.fromkeys(part, bias))
        return tuple(sorted(biases.items()))


class InfillRequests(LlamaCppRequests):
    """One completion that fills a gap."""

    def __init__(self, service: TextService, body: InfillBody, adapters: AdapterScales) -> None:
        super().__init__(service, body, adapters)
        self._gap = body.gap

    async def _prompts(self) -> list[Prompt]:
        return [await self._service.fill_in(self._gap, self._body.max_new_tokens)]


class LlamaCppView(View):
    """One answer to each prompt."""

    def __init__(self, service: TextService, body: LlamaCppBody, log: AnswerLog) -> None:
        self._answers = [_PromptView(service, body, place, one) for place, one in enumerate(log.generations)]

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`. Progress is in a slot of its own: a reply that is computed again has other ones."""
        answer = self._answers[prompt]
        if isinstance(item, PromptProgress):
            return [Event(len(self._answers) + 1, event(answer.progress(item)))]
        return [Event(prompt, event(answer.chunk(item)))]

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        """See `View`. A list where there are several prompts."""
        shown = [view.whole(answer) for view, (answer,) in zip(self._answers, parts, strict=True)]
        return shown[0] if len(shown) == 1 else shown


class _PromptView:
    """The answer to one prompt."""

    def __init__(self, service: TextService, body: LlamaCppBody, index: int, generation: GenerationRequest) -> None:
        self._service = service
        self._body = body
        self._generation = generation
        self._index = index
        self._predicted = 0
        self._has_new_line = False

    def whole(self, answer: TextChunk) -> dict[str, Any]:
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
        timings = {}
        if self._body.timings_per_token and chunk.timings is not None:
            timings["timings"] = shown_timings(chunk.timings)
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
        slot, evaluated = self._body.slot or 0, len(self._generation.prompt)
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
            "lora": [{"id": number, "scale": scale} for number, scale in self._generation.adapters],
            "logit_bias": self._shown_biases(),
            "seed": self._generation.seed,
            "speculative.n_max": most if wanted is None else min(most, wanted),
            "n_ctx": self._service.settings.context_length,
        }

    def _shown_biases(self) -> list[dict[str, Any]]:
        """null: the token may not be chosen."""
        biases: dict[int, float | None] = dict(self._generation.params.logit_bias)
        if self._body.ignore_eos:
            biases |= dict.fromkeys(self._service.tokenizer.end_of_generation)
        return [{"token": token, "bias": None if bias == NEVER else bias} for token, bias in sorted(biases.items())]


def _stop_type(part: TextChunk) -> str:
    if part.finish_reason is FinishReason.LENGTH:
        return "limit"
    return "word" if isinstance(part.stopped_by, str) else "eos"
