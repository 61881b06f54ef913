"""Timings by llama.cpp's names."""

from __future__ import annotations

from typing import Any

from llamaclust.cluster.scheduler.requests import PromptProgress, Timings


def shown_timings(timings: Timings) -> dict[str, float]:
    computed = timings.prompt_tokens - timings.cached_tokens
    drafts = {"draft_n": timings.drafted_tokens, "draft_n_accepted": timings.accepted_tokens}
    return {
        "cache_n": timings.cached_tokens,
        **_phase("prompt", computed, computed, timings.prefill_tok_s),
        **_phase("predicted", timings.generated_tokens, max(0, timings.generated_tokens - 1), timings.decode_tok_s),
        **(drafts if timings.drafted_tokens else {}),
    }


def shown_progress(progress: PromptProgress, *, with_timings: bool) -> dict[str, Any]:
    """Fields of an event."""
    shown = {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": progress.since_ms,
    }
    computed, seconds = progress.processed - progress.cached, progress.since_ms / 1e3
    prompt = _phase("prompt", computed, computed, computed / seconds if seconds else 0.0)
    timings = {"timings": {"cache_n": progress.cached, **prompt, **_phase("predicted", 0, 0, 0.0)}}
    return {"prompt_progress": shown, **(timings if with_timings else {})}


def _phase(name: str, tokens: int, measured: int, per_second: float) -> dict[str, float]:
    """`measured` of the tokens were computed within the time that the rate is of."""
    ms = measured / per_second * 1e3 if per_second else 0.0
    return {
        f"{name}_n": tokens,
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / measured if measured else 0.0,
        f"{name}_per_second": per_second,
    }
