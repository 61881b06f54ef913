"""Parts of OpenAI's replies that both endpoints share: logprobs, usage, timings, names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.cluster.text.answer import Answer, TextChunk, json_logprob
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.sampling import RowResult
from llamaclust.core.version import VERSION
from llamaclust.model.tokenizers.tokenizer import Tokenizer

FINGERPRINT = f"llamaclust-{VERSION}-numerics-{NUMERICS_VERSION}"
"""`system_fingerprint`: equal ones compute alike."""


def token_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token as /v1/chat/completions and llama.cpp show it; `id` is llama.cpp's."""
    data = tokenizer.token_bytes(token)
    return {
        "id": token,
        "token": data.decode("utf-8", "replace"),
        "logprob": json_logprob(logprob),
        "bytes": list(data),
    }


def row_entry(tokenizer: Tokenizer, row: RowResult) -> dict[str, Any]:
    """A chosen token with the likeliest ones in its place."""
    top = [token_entry(tokenizer, token, logprob) for token, logprob in row.top_logprobs]
    return {**token_entry(tokenizer, row.token, row.logprob), "top_logprobs": top}


def usage(prompts: Iterable[int], completion_tokens: int, timings: Sequence[Timings]) -> dict[str, Any]:
    """Token counts: prompts' lengths, tokens chosen in all, and the timings of each prompt's first choice."""
    prompt_tokens = sum(prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(timing.cached_tokens for timing in timings)},
    }


def ending(part: TextChunk | Answer) -> dict[str, Any]:
    """How a choice ended, null while it goes on. `stop_reason` (vLLM's) is the stop string or the end token's id."""
    if part.finish_reason is None or part.timings is None:
        return {"finish_reason": None}
    return {
        "finish_reason": str(part.finish_reason),
        "stop_reason": part.stopped_by,
        "timings": asdict(part.timings),
    }
