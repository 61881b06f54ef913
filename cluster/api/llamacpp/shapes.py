"""Replies of llama.cpp's /completion."""

from __future__ import annotations

from typing import Any

from llamaclust.cluster.api.llamacpp.schema import LlamaCppBody
from llamaclust.cluster.api.openai.shapes import row_entry
from llamaclust.cluster.scheduler.requests import FinishReason, Timings
from llamaclust.cluster.text.answer import Answer, TextChunk
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.model.tokenizers.tokenizer import Tokenizer


class LlamaCppShape:
    """The replies to one request."""

    def __init__(self, service: TextService, body: LlamaCppBody, stream: CompletionStream) -> None:
        self._service = service
        self._body = body
        self._stream = stream
        self._predicted = 0

    def whole(self, answer: Answer) -> dict[str, Any]:
        tokens = answer.token_ids if self._body.return_tokens else ()
        return {
            "index": 0,
            "content": answer.text,
            "tokens": tokens,
            **self._end(answer),
            **self._probabilities(answer),
        }

    def chunk(self, chunk: TextChunk) -> dict[str, Any]:
        """One event. The last has no tokens."""
        self._predicted += len(chunk.rows)
        shown = {"index": 0, "content": chunk.text, "tokens": chunk.token_ids}
        if chunk.finish_reason is not None:
            return {**shown, **self._end(chunk)}
        return {**shown, **self._counts(self._predicted), "stop": False, **self._probabilities(chunk)}

    def _end(self, part: TextChunk | Answer) -> dict[str, Any]:
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
            "tokens_cached": part.timings.cached_tokens,
            "generation_settings": self._settings(),
            "timings": llamacpp_timings(part.timings),
        }

    def _counts(self, predicted: int) -> dict[str, int]:
        return {"id_slot": 0, "tokens_predicted": predicted, "tokens_evaluated": len(self._stream.prompt_token_ids)}

    def _probabilities(self, part: TextChunk | Answer) -> dict[str, Any]:
        if not self._body.n_probs:
            return {}
        return {"completion_probabilities": [row_entry(self._service.tokenizer, row) for row in part.rows]}

    def _settings(self) -> dict[str, Any]:
        fields = self._body.model_dump(exclude={"prompt", "return_tokens"})
        return {**fields, "seed": self._stream.seed, "n_ctx": self._service.settings.context_length}


def llamacpp_timings(timings: Timings) -> dict[str, float]:
    computed = timings.prompt_tokens - timings.cached_tokens
    return {
        "cache_n": timings.cached_tokens,
        **_phase("prompt", computed, computed, timings.prefill_tok_s),
        **_phase("predicted", timings.generated_tokens, max(0, timings.generated_tokens - 1), timings.decode_tok_s),
    }


def piece_entry(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token with its text, or its bytes where they are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


def _phase(name: str, tokens: int, measured: int, per_second: float) -> dict[str, float]:
    """`measured` of the tokens were computed within the time that the rate is of."""
    ms = measured / per_second * 1e3 if per_second else 0.0
    return {
        f"{name}_n": tokens,
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / measured if measured else 0.0,
        f"{name}_per_second": per_second,
    }


def _stop_type(part: TextChunk | Answer) -> str:
    if part.finish_reason is FinishReason.LENGTH:
        return "limit"
    return "word" if isinstance(part.stopped_by, str) else "eos"
